"""The load tool, compiled and run; the proxies' CPU clocks are read when it says start and end."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from pyambient.bench.pods import Placement
from pyambient.bench.rounds import Sample
from pyambient.errors import PyambientError

_SOURCE = Path(__file__).with_name("load.c")
_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror")


def build(directory: Path) -> Path:
    """Compile load.c; the path of the program."""
    program = directory / "load"
    directory.mkdir(parents=True, exist_ok=True)
    if not program.exists() or program.stat().st_mtime < _SOURCE.stat().st_mtime:
        subprocess.run(["cc", *_FLAGS, "-o", str(program), str(_SOURCE)], check=True)
    return program


class Load:
    """One run of the load tool, from its start on."""

    def __init__(self, program: Path, place: Placement, *words: object) -> None:
        self.words = " ".join(map(str, words))
        self._process = place.start(
            [str(program), *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def wait_warm(self) -> None:
        """Until it says start: from here on it counts, or holds what it was to open."""
        if self._line() != "start\n":
            raise self._failure()

    def result(self, at_end: Callable[[], None] = lambda: None) -> Sample:
        """What it counted; `at_end` is called at the moment up to which it did."""
        counted = self._line()
        at_end()
        try:
            sample = {**json.loads(counted), **json.loads(self._line())}
        except ValueError:
            raise self._failure() from None
        self._process.wait()
        return sample

    def end(self) -> None:
        """End it, whatever it is doing."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 - a pipe
        return self._process.stdout.readline()

    def _failure(self) -> PyambientError:
        self.end()
        return PyambientError(f"'load {self.words}' failed", "see what it wrote above")

    def __repr__(self) -> str:
        return f"<Load {self.words}>"
