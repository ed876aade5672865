"""What the command line says, on its way behind the walls."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self


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


WHOLE: Final = Settings(
    out="",
    backends=("bpf", "tc", "nftables", "iptables"),
    enrolled=("client", "server", "both", "others"),
    proxies=("null", "real"),
    work=("connections", "ping-pong", "bulk", "dns", "held"),
    excluded=(0, 100, 10_000),
    pods=(1, 10, 100, 500),
    places=(1, 200),
    times=100,
    rounds=5,
    seconds=1.0,
)
# A little of everything.
QUICK: Final = dataclasses.replace(
    WHOLE,
    enrolled=("client",),
    proxies=("null",),
    excluded=(0, 100),
    pods=(1, 4),
    places=(1, 4),
    times=5,
    rounds=1,
    seconds=0.1,
)
