"""A running `pyambient trace`, for tests."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

from pyambient.intercept.node_pins import node_map
from pyambient.intercept.trace_reader import PLACES_MAP
from tests.bed.patience import patience
from tests.intercept.bpf_mesh import BPFFS

from .conftest import Pair


class Tracing:
    """A running `pyambient trace -o json`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stderr is not None
        self.said = process.stderr.readline()

    def until(self, decision: str) -> list[dict[str, Any]]:
        """The events up to the first of this decision."""
        assert self.process.stdout is not None
        events: list[dict[str, Any]] = []
        while not events or events[-1]["decision"] != decision:
            events.append(json.loads(self.process.stdout.readline()))
        return events

    def is_told(self, timeout: float) -> bool:
        """Whether something more comes within so many seconds."""
        return bool(select.select([self.process.stdout], [], [], timeout)[0])

    def end(self) -> str:
        """End it as a user does; the rest of what it said on stderr."""
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=patience(20))
        assert self.process.returncode == 0
        return said


@contextlib.contextmanager
def tracing(pair: Pair, *words: str) -> Iterator[Tracing]:
    with pair.mesh.spawn("trace", *words, "-o", "json") as process:
        try:
            yield Tracing(process)
        finally:
            process.kill()


def is_anybody_reading() -> bool:
    """Whether a place is taken, by somebody dead or alive."""
    found = node_map(BPFFS, PLACES_MAP)
    assert found is not None
    with found:
        return any(found.get(bytes(4)) or b"")
