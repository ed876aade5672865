"""The netfilter backends and the kernels that tests hold for, each of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyambient.errors import UnsupportedFeature
from pyambient.intercept import probe
from pyambient.intercept.bpf_node import NodePrograms
from pyambient.intercept.interface import Interceptor
from pyambient.intercept.loader import Constants
from pyambient.netns import Netns
from tests.bed import Bed, BedPod, CgroupTree
from tests.bed.masquerade import masqueraded

from .bpf_mesh import BPFFS, BpfMesh
from .netfilter_mesh import INTERCEPTORS


@pytest.fixture(params=["nftables", "iptables-nft"])
def interceptor(request: pytest.FixtureRequest) -> Interceptor:
    """The backend under test."""
    return INTERCEPTORS[request.param]


@pytest.fixture(name="masqueraded")
def _masqueraded(bed: Bed) -> Iterator[BedPod]:
    """A pod that reaches the others from the node's own address."""
    with masqueraded(bed) as pod:
        yield pod


@pytest.fixture(params=["bpf", "tc"])
def bpf_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that `BpfMesh` enrols with, both in turn."""
    monkeypatch.setattr(BpfMesh, "backend", request.param)
    return str(request.param)


@pytest.fixture(params=["this kernel", "as Linux 5.10"])
def kernel(
    request: pytest.FixtureRequest, cgroup_tree: CgroupTree, monkeypatch: pytest.MonkeyPatch
) -> Constants:
    """What BPF programs are told of the kernel: the truth, or that it has just what 5.10 has.

    All that stands in for what is missing then works on every later kernel as well.
    """
    if request.param == "as Linux 5.10":
        monkeypatch.setattr(probe, "constants", _of_linux_5_10)
        monkeypatch.setattr(Netns, "cookie", _no_cookie)
    return probe.constants(cgroup_tree.path)


def _of_linux_5_10(cgroup: Path) -> Constants:
    return Constants(node=probe.node_cookie(cgroup))


def _no_cookie(netns: Netns) -> int:
    raise UnsupportedFeature("SO_NETNS_COOKIE", "5.14")


@pytest.fixture
def node(cgroup_tree: CgroupTree) -> Iterator[NodePrograms]:
    """The node's programs, claimed by nobody, on a cgroup of the test's own."""
    cgroup = cgroup_tree.path / "node"
    cgroup.mkdir()
    programs = NodePrograms(BPFFS, cgroup)
    yield programs
    for directory in list((BPFFS / "pods").glob("*")):
        programs.release(directory.name)
    assert not BPFFS.exists()
    cgroup.rmdir()
