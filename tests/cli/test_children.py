"""Processes that pyambient starts of itself."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
import trio

from pyambient.children import Child, module, start
from tests.bed.patience import patience


def test_nothing_is_imported_from_the_folder_where_one_happens_to_be(tmp_path: Path) -> None:
    """It may be /tmp, and the file anybody's: it would run as root."""
    (tmp_path / "trio.py").write_text("raise SystemExit('imported')")
    subprocess.run(module("pyambient", "--help"), cwd=tmp_path, check=True, capture_output=True)


def test_a_start_that_fails_later_on_ends_nothing_else() -> None:
    """Short of processes once, a child is tried again; before all are up its parent is told."""
    said: list[str] = []
    begun: list[subprocess.Popen[bytes]] = []
    has_begun = trio.Event()

    def begin() -> subprocess.Popen[bytes]:
        if len(said) == 0:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        begun.append(start(["sleep", "60"]))
        has_begun.set()
        return begun[-1]

    async def main() -> None:
        ready = trio.Event()
        child = Child("worker 0", begin, 5.0, ready, said.append)
        with pytest.raises(OSError, match="temporarily unavailable"):
            await child.keep_running()
        ready.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.keep_running)
            with trio.fail_after(patience(10)):
                await has_begun.wait()
            nursery.cancel_scope.cancel()

    trio.run(main)
    reason = os.strerror(errno.EAGAIN)
    assert said == [f"the worker 0 could not be started: {reason}; next start in 0.5 s"]
    assert begun[0].returncode is not None
