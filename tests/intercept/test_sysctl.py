"""Sysctls of a pod: set, restored, and never those of another namespace."""

from __future__ import annotations

import dataclasses
import socket

import pytest

from pyambient.errors import PyambientError
from pyambient.intercept.interface import Pod, from_record, to_record
from pyambient.intercept.sysctl import ReservedPorts, Sysctl, read
from tests.bed import Bed, BedPod

NAME = "net.ipv4.tcp_fwmark_accept"
PORTS = "net.ipv4.ip_local_reserved_ports"


def _pod(pod: BedPod) -> Pod:
    return Pod(pod.name, pod.netns)


def _set(pod: BedPod, name: str, value: str) -> None:
    pod.command("sysctl", "-qw", f"{name}={value}")


def test_a_sysctl_is_set_in_one_pod_and_restored(bed: Bed) -> None:
    """The pod's value changes and comes back; neither the node's nor another pod's moves."""
    pod, other = bed.pod("a"), bed.pod("b")
    step = Sysctl(NAME, "1")
    assert step.missing(_pod(pod)) == f"{NAME} is 0"

    applied = step.apply(_pod(pod))

    assert applied.previous == "0"
    assert [read(p.netns, NAME) for p in (pod, other, bed.node)] == ["1", "0", "0"]
    assert step.missing(_pod(pod)) is None
    applied.undo(_pod(pod))
    assert read(pod.netns, NAME) == "0"


def test_an_applied_sysctl_remembers_through_a_second_apply(bed: Bed) -> None:
    """After drift and repair, and through a record on disk, the first previous value counts."""
    pod = bed.pod("a")
    applied = Sysctl(NAME, "1").apply(_pod(pod))
    _set(pod, NAME, "0")
    (recorded,) = from_record(to_record([applied]))
    again = recorded.apply(_pod(pod))
    assert (again, again.previous) == (Sysctl(NAME, "1"), "0")
    assert read(pod.netns, NAME) == "1"


def test_a_value_of_somebody_else_stays(bed: Bed) -> None:
    """What was changed since, or was so before, is not touched by undoing."""
    pod = bed.pod("a")
    reserved = "net.ipv4.ip_local_port_range"
    applied = Sysctl(reserved, "20000\t30000").apply(_pod(pod))
    _set(pod, reserved, "21000 31000")
    applied.undo(_pod(pod))
    assert read(pod.netns, reserved) == "21000\t31000"

    same = Sysctl(reserved, "21000\t31000").apply(_pod(pod))
    same.undo(_pod(pod))
    assert read(pod.netns, reserved) == "21000\t31000"


def test_a_step_that_was_never_applied_undoes_nothing(bed: Bed) -> None:
    """A plan in the record that never came to be leaves the pod as it is."""
    pod = bed.pod("a")
    _set(pod, NAME, "1")
    _set(pod, PORTS, "15001")
    Sysctl(NAME, "1").undo(_pod(pod))
    ReservedPorts().undo(_pod(pod))
    assert [read(pod.netns, name) for name in (NAME, PORTS)] == ["1", "15001"]


def test_a_sysctl_that_the_kernel_lacks_is_named(bed: Bed) -> None:
    """The error says which, and undoing is no error."""
    pod = bed.pod("a")
    step = Sysctl("net.ipv4.no_such_thing", "1")
    with pytest.raises(PyambientError, match=r"no sysctl net\.ipv4\.no_such_thing in a;"):
        step.apply(_pod(pod))
    dataclasses.replace(step, previous="0").undo(_pod(pod))


def test_reserved_ports_are_merged_and_taken_out(bed: Bed) -> None:
    """The app's own reserved ports stay, among them one that we want as well."""
    pod = bed.pod("a")
    _set(pod, PORTS, "8080,15008,20000-20009")
    step = ReservedPorts()
    assert step.missing(_pod(pod)) == "not reserved: 15001,15006,15053"

    applied = step.apply(_pod(pod))

    assert applied.added == (15001, 15006, 15053)
    assert read(pod.netns, PORTS) == "8080,15001,15006,15008,15053,20000-20009"
    assert step.missing(_pod(pod)) is None
    _set(pod, PORTS, f"{read(pod.netns, PORTS)},30000")
    applied.undo(_pod(pod))
    assert read(pod.netns, PORTS) == "8080,15008,20000-20009,30000"


def test_reserved_ports_of_a_pod_without_any(bed: Bed) -> None:
    """Nothing reserved before is nothing reserved after, also when applied twice."""
    pod = bed.pod("a")
    applied = ReservedPorts().apply(_pod(pod)).apply(_pod(pod))
    assert read(pod.netns, PORTS) == "15001,15006,15008,15053"
    (recorded,) = from_record(to_record([applied]))
    recorded.undo(_pod(pod))
    assert read(pod.netns, PORTS) == ""


def test_a_reserved_port_is_no_source_port(bed: Bed) -> None:
    """The kernel hands out no reserved port, even where it has nothing else left."""
    pod = bed.pod("a")
    _set(pod, "net.ipv4.ip_local_port_range", "15000 15001")
    ReservedPorts().apply(_pod(pod))
    assert pod.run(_source_ports) == {15000}


def _source_ports() -> set[int]:
    ports = set()
    for _ in range(8):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.bind(("127.0.0.1", 0))
            ports.add(client.getsockname()[1])
    return ports
