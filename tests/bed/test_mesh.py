"""The bed's mesh: it must notice what it is there to notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bed import Bed, Mesh


def test_what_is_left_behind_is_noticed(mesh: Mesh, bed: Bed) -> None:
    """A rule that outlives the enrolment fails the check, and is named."""
    pod = bed.pod("a")
    mesh.enroll(pod, backend="iptables")
    mesh.unenroll(pod)
    mesh.assert_nothing_left()
    pod.ip("rule add fwmark 0x111/0xfff pref 32764 lookup 100")
    with pytest.raises(AssertionError, match="fwmark 0x111/0xfff lookup 100"):
        mesh.assert_nothing_left()
    pod.ip("rule del pref 32764")


def test_a_start_that_fails_shows_the_log(bed: Bed, tmp_path: Path) -> None:
    """When `up` ends at once, the test ends with what it said."""
    mesh = Mesh(bed, tmp_path)
    mesh.ca_dir = Path("/proc/none")
    with pytest.raises(AssertionError, match=r"up ended early:(.|\n)*/proc/none"):
        mesh.start()


def test_a_failing_command_fails_the_test(mesh: Mesh) -> None:
    """A command's exit code is checked, and what it printed is shown."""
    with pytest.raises(AssertionError, match="nowhere' cannot be opened"):
        mesh.cli("enroll", "nowhere", "--namespace=a", "--service-account=b")
    assert "nowhere" in mesh.cli("unenroll", "nowhere", code=2).stderr
