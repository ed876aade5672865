"""The programs of a node that are loaded before its first pod comes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyambient.intercept import probe
from pyambient.intercept.bpf_node import NodePrograms
from pyambient.intercept.kernel_objects import Map
from pyambient.intercept.loader import Constants
from pyambient.intercept.node_hooks import HOOKS
from pyambient.intercept.node_objects import ahead
from pyambient.intercept.node_pins import node_map
from tests.bed import Bed, apps

from .bpf_mesh import BPFFS, BpfMesh, at, links_on, serve

_CONSTANTS = Constants(node=1)


@pytest.fixture
def ready(node: NodePrograms) -> Iterator[NodePrograms]:
    """The node's programs, loaded."""
    node.load_ahead(_CONSTANTS)
    yield node
    ahead.close()


def programs(node: NodePrograms) -> set[int]:
    """The ids of those that are attached."""
    cgroups = filter(Path.exists, (node.cgroup, node.proxy_cgroup))
    return {link.program for link in links_on(*cgroups)}


def pinned(name: str) -> Map:
    found = node_map(BPFFS, name)
    assert found is not None
    return found


def test_what_is_loaded_ahead_is_neither_pinned_nor_attached(ready: NodePrograms) -> None:
    """An agent without a pod costs the sockets of the node nothing, and leaves nothing behind."""
    assert not BPFFS.exists()
    assert not ready.proxy_cgroup.exists()
    assert programs(ready) == set()


def test_each_first_pod_gets_what_is_loaded(ready: NodePrograms) -> None:
    """Also the next one, when the last pod has taken everything along."""
    ready.claim("one", _CONSTANTS)
    first = programs(ready)
    ready.release("one")
    assert programs(ready) == set()
    assert not BPFFS.exists()
    ready.claim("two", _CONSTANTS)
    assert ready.missing("two") is None
    assert programs(ready) == first
    assert len(first) == len(HOOKS)


def test_what_was_loaded_for_another_kernel_is_not_taken(ready: NodePrograms) -> None:
    """The constants are part of a program."""
    ready.claim("one", _CONSTANTS)
    first = programs(ready)
    ready.release("one")
    ready.claim("one", Constants(node=2))
    assert programs(ready).isdisjoint(first)


def test_a_probe_of_before_is_none_of_the_next_pods(ready: NodePrograms) -> None:
    """An entry lets a SYN past policy, and says nothing of the pod that it is for."""
    ready.claim("one", _CONSTANTS)
    with pinned("probes") as probes:
        probes.put(bytes(probes.key_size), b"\1")
    ready.release("one")
    ready.claim("two", _CONSTANTS)
    with pinned("probes") as probes:
        assert list(probes.keys()) == []


def test_programs_of_pods_that_are_there_are_not_loaded_ahead(node: NodePrograms) -> None:
    """An agent that starts where pods are enrolled finds their programs at work."""
    node.claim("one", _CONSTANTS)
    first = programs(node)
    node.load_ahead(_CONSTANTS)
    node.release("one")
    node.claim("two", _CONSTANTS)
    assert programs(node).isdisjoint(first)
    ahead.close()


def test_pods_are_captured_by_what_was_loaded_ahead(bed: Bed) -> None:
    """Twice, each time from the first pod to the last."""
    a, b, c = (bed.pod(name) for name in "abc")
    serve(c)
    mesh = BpfMesh(bed, a, b)
    node = NodePrograms(BPFFS, bed.cgroup.path)
    node.load_ahead(probe.constants(bed.cgroup.path))
    with contextlib.closing(ahead):
        for _ in range(2):
            with mesh:
                for family in ("v4", "v6"):
                    assert a.run(apps.request, at(c, family), b"hello").data == b"hello"
                    assert b.run(apps.request, at(c, family), b"hello").data == b"hello"
                assert {(s.pod, s.port) for s in mesh.intercepted()} == {("a", 15001), ("b", 15001)}
