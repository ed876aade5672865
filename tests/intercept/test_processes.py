"""Processes of a pod, under whatever names they gave themselves."""

from __future__ import annotations

import ctypes

import pytest

from pyambient.intercept.processes import processes_in
from tests.bed import Bed, Channel

_PR_SET_NAME = 15


def _wait_as(channel: Channel, name: bytes) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name)
    channel.send("named")
    channel.receive()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"nginx", "nginx"),
        (b"\xff", "\ufffd"),
        (b"a\nb", "a?b"),
        (b"\x1b[2J", "?[2J"),
        ("größer".encode(), "größer"),
        (b"", ""),
    ],
)
def test_a_name_that_is_no_text_is_shown_as_some(bed: Bed, name: bytes, shown: str) -> None:
    """A process sets any bytes as its own name; what names it stays one printable line."""
    pod, other = bed.pod("one"), bed.pod("two")
    named = pod.spawn(_wait_as, name)
    assert named.receive() == "named"
    assert [str(process) for process in processes_in(pod.netns)] == [f"{named.pid} ({shown})"]
    assert list(processes_in(other.netns)) == []


def test_a_cgroup_whose_name_is_no_text_is_found(bed: Bed) -> None:
    """Nor is a part of its name taken for another one's."""
    outside = bed.cgroup.path / "a\x0cb\udcff"
    outside.mkdir()
    pod = bed.pod("one")
    inside = pod.spawn(_wait_as, b"x", cgroup=outside)
    assert inside.receive() == "named"
    found = [process.cgroup for process in processes_in(pod.netns)]
    assert [cgroup and cgroup.name for cgroup in found] == [outside.name]
    inside.kill()
