"""A line per stage with its seconds; a spinner while it takes, where a person is watching."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import BedError

_FRAMES = "|/-\\"
_POLL = 0.1


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Tell that `title` begins and, when it went well, how long it took."""
    began = time.monotonic()
    if not sys.stderr.isatty():
        _say(f"test bed: {title} ...\n")
    yield
    _say(f"{_clear()}test bed: {title}: {time.monotonic() - began:.0f} s\n")


def run(
    title: str,
    command: Sequence[str | Path],
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a command of the stage `title`, its output to `log`; BedError quotes its last line."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            code = _watch(title, process)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        raise BedError(f"{title}: {last_line(log)}", f"read {log}")


def _watch(title: str, process: subprocess.Popen[bytes]) -> int:
    began = time.monotonic()
    for frame in itertools.cycle(_FRAMES):
        try:
            return process.wait(_POLL)
        except subprocess.TimeoutExpired:
            if sys.stderr.isatty():
                _say(f"{_clear()}{frame} {title} {time.monotonic() - began:.0f} s")
    raise AssertionError("the frames never end")


def last_line(log: Path) -> str:
    """The last line with something on it: where most programs say why they gave up."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "ended without a word"


def _clear() -> str:
    return "\r\033[K" if sys.stderr.isatty() else ""


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
