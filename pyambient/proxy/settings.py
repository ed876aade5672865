"""How a proxy runs, as one value that fits into a command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """How a proxy runs; times in seconds.

    `direct`: pods of this proxy reach one another without a tunnel. `debug`: a failure that ends
    the process shows its traceback.
    """

    run_dir: Path
    ca_dir: Path
    trust_domain: str
    mesh: Path | None = None
    log_format: str = "plain"
    log_level: str = "info"
    drain_timeout: float = 5.0
    direct: bool = False
    workers: int = 1
    debug: bool = False

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` made."""
        fields = json.loads(text)
        paths = {name: Path(fields[name]) for name in ("run_dir", "ca_dir")}
        mesh = fields["mesh"]
        return cls(**{**fields, **paths, "mesh": None if mesh is None else Path(mesh)})


class Seat(NamedTuple):
    """What one worker of several is told: its number, its parent's pid, its two connections."""

    number: int
    parent: int
    zds: int
    details: int

    def words(self) -> list[str]:
        """For the command line, behind the settings."""
        return [str(number) for number in self]

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Self | None:
        """What `words` made; None for a proxy that has no parent."""
        return cls(*map(int, words)) if words else None
