"""A step of an examination, and what becomes of tests that fail in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vagrant.testbed.examination import Outcome, Step, examine, steps
from vagrant.testbed.selection import BACKENDS, Extent

_UNLUCKY = """
from pathlib import Path

def test_that_fails_once():
    marker = Path("been-here")
    seen = marker.exists()
    marker.touch()
    assert seen

def test_that_passes():
    pass
"""
_WRONG = "def test_that_fails():\n    assert False\n"


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Step:
    """A step that runs the tests in a directory of its own."""
    monkeypatch.setenv("RESULTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    report = f"--junitxml={tmp_path / 'tests-bpf.xml'}"
    return Step("bpf", "tests", (sys.executable, "-m", "pytest", "-q", report, "test_it.py"))


def _result(outcome: Outcome) -> tuple[int, int, int, int]:
    return outcome.code, outcome.passed, outcome.failed, outcome.again


def test_what_fails_once_is_told(step: Step) -> None:
    """The step is well, and says what took a second attempt."""
    Path("test_it.py").write_text(_UNLUCKY)
    assert _result(examine(step)) == (0, 2, 0, 1)


def test_what_fails_twice_has_failed(step: Step) -> None:
    """However well the rest is."""
    Path("test_it.py").write_text(_UNLUCKY + _WRONG)
    assert _result(examine(step)) == (1, 1, 2, 0)


def test_many_failures_are_no_bad_luck(step: Step) -> None:
    """They are not tried again."""
    Path("test_it.py").write_text("".join(_WRONG.replace("fails", f"fails_{n}") for n in range(3)))
    assert _result(examine(step)) == (1, 0, 3, 0)
    assert not Path("tests-bpf-again.log").exists()


@pytest.mark.parametrize("extent", Extent)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tests_of_a_step_are_there(backend: str, extent: Extent) -> None:
    """A test that moved to another file would otherwise be missed in a guest only."""
    step = next(steps([backend], has_bpf=True, extent=extent))
    collect = [*step.command, "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(collect, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
