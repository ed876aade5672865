"""The test bed's command lines: what a user reads when they cannot go on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vagrant.testbed import main

_NOBODY = 65534


@contextmanager
def _nobody() -> Iterator[None]:
    """Without root's rights on files."""
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("arguments", [[], ["--no-build"]])
def test_a_cache_that_may_not_be_read_is_said_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    """Another user's cache, such as root's own: one line with the folder and the variable."""
    (tmp_path / "testbed").mkdir()
    tmp_path.chmod(0o700)
    monkeypatch.setenv("PYAMBIENT_CACHE", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda *_: None)

    with _nobody():
        assert main.build(arguments) == 125
    said = capsys.readouterr().err
    assert "Permission denied; " in said
    assert "PYAMBIENT_CACHE" in said
    assert said.count("\n") == 1
