"""What the command line says, on its way behind the walls."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured; `seconds` is the time of each measurement.

    `proxies` are those that serve the pods of `work`. `excluded` and `pods` are the numbers of
    CIDRs and of enrolled pods that the cost is measured against, `places` the pods whose enrolment
    is timed, `times` each. With `add`, what `out` has is kept, and more is added.
    """

    out: str
    backends: tuple[str, ...]
    enrolled: tuple[str, ...]
    proxies: tuple[str, ...]
    work: tuple[str, ...]
    excluded: tuple[int, ...]
    pods: tuple[int, ...]
    places: tuple[int, ...]
    times: int
    rounds: int
    seconds: float
    add: bool = False
    check: bool = False

    @property
    def directory(self) -> Path:
        return Path(self.out).parent

    def as_text(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of_text(cls, text: str) -> Self:
        values: dict[str, Any] = json.loads(text)
        lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
        return cls(**{**values, **lists})
