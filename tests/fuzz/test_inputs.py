"""The inputs that fuzzing begins with, and those that once broke something, as test cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from .__main__ import INPUTS
from .targets import TARGETS, frames

KEPT = sorted(path for path in INPUTS.glob("*/*"))


def test_every_target_has_inputs() -> None:
    """Each directory is a target's, and none is empty."""
    assert {path.parent.name for path in KEPT} == set(TARGETS)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input(path: Path) -> None:
    """The target takes it."""
    TARGETS[path.parent.name](path.read_bytes())


def test_a_target_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that loses a credit is found out."""
    session = (INPUTS / "frames" / "server-session").read_bytes()
    monkeypatch.setattr("pyambient.hbone.endpoint.Endpoint._consume_connection", lambda *_: None)
    with pytest.raises(AssertionError):
        frames(session)
