"""The traffic tools, compiled and run; the proxies' CPU clocks are read when they say so."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from pyambient.bench.pods import Placement
from pyambient.bench.rounds import Sample
from pyambient.errors import PyambientError

_HERE = Path(__file__).parent
_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", f"-I{_HERE}")
LOAD_SOURCE = _HERE / "load.c"


def build(directory: Path, source: Path = LOAD_SOURCE) -> Path:
    """Compile a C file that has its own name in `directory`; the path of the program."""
    program = directory / source.stem
    directory.mkdir(parents=True, exist_ok=True)
    newest = max(file.stat().st_mtime for file in (source, *_HERE.glob("*.h")))
    if not program.exists() or program.stat().st_mtime < newest:
        subprocess.run(["cc", *_FLAGS, "-o", str(program), str(source)], check=True)
    return program


class Load:
    """One run of a traffic tool, from its start on."""

    def __init__(self, program: Path, place: Placement, *words: object) -> None:
        self.words = " ".join((program.name, *map(str, words)))
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

    def last_words(self) -> Sample:
        """What one that runs until its standard input ends says then."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        self._process.stdin.close()
        try:
            said: Sample = json.loads(self._line())
        except ValueError:
            raise self._failure() from None
        self._process.wait()
        return said

    @property
    def pid(self) -> int:
        return self._process.pid

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
        return PyambientError(f"'{self.words}' failed", "see what it wrote above")

    def __repr__(self) -> str:
        return f"<Load {self.words!r}>"
