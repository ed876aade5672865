"""What was measured, in memory and on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyambient.bench.report import machine, write_json
from pyambient.bench.rounds import Results, Sample
from pyambient.errors import PyambientError, UsageError

from .settings import Settings


class Samples:
    """The results of a run, with those of earlier runs if it adds to them.

    What is compared is added at once: whenever a run ends, no ratio has lost its other half.
    """

    def __init__(self, settings: Settings) -> None:
        self.results = Results()
        self._path = Path(settings.out)
        self._head = {"machine": machine(), "settings": dataclasses.asdict(settings)}
        if settings.add and self._path.exists():
            self.results.samples = read(self._path)["samples"]

    def add(self, measured: Sequence[tuple[str, str, Sample]]) -> None:
        """Add what was measured in one go: samples of one round, all of which can be compared."""
        number = 1 + max((self._rounds(row) for row, _, _ in measured), default=0)
        for row, subject, sample in measured:
            self.results.add(row, subject, {**sample, "round": number})
        write_json(self._path, {**self._head, "samples": self.results.samples})

    def _rounds(self, row: str) -> float:
        """The number of the last round that the row was in."""
        subjects = self.results.samples.get(row, {}).values()
        return max((sample["round"] for samples in subjects for sample in samples), default=0)

    def __repr__(self) -> str:
        return f"<Samples in {self._path}>"


def read(path: Path) -> dict[str, Any]:
    """What a run wrote: "machine", "settings" and "samples"; an error of one line if it did not."""
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        for name in ("machine", "settings", "samples"):
            dict.keys(content[name])  # a TypeError for what is none
    except FileNotFoundError:
        raise UsageError(
            f"there is no {path}", "run 'sudo pyambient bench intercept' first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PyambientError(
            f"{path} is not what 'bench intercept' writes ({type(error).__name__}: {error})",
            "run 'sudo pyambient bench intercept' once more",
        ) from None
    return content
