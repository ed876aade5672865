"""What is measured: work, subjects that do it, and a cell, which is one of each in one family."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pyambient.model.numbers import RESOLVER_PORT

APP_PORT: Final = 9000
ECHO, SINK, HOST = APP_PORT, APP_PORT + 1, APP_PORT + 3
CLIENT, SERVER, BOTH, NOBODY = "client", "server", "both", "nobody"
NULL, REAL, NO_PROXY = "null", "real", "none"
FAMILIES: Final = ("v4", "v6")


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of traffic: what the tool `queries` or `load` does, and at which port.

    `held` idle connections go the same way meanwhile.
    """

    name: str
    kind: str
    port: int
    held: int = 0

    @property
    def is_dns(self) -> bool:
        return self.port == RESOLVER_PORT

    @property
    def connects_each_time(self) -> bool:
        """Whether each operation is a connection or a query of its own."""
        return self.kind in ("visits", "ask")


CONNECTIONS: Final = Work("connections", "visits", HOST)
PING_PONG: Final = Work("ping-pong", "trips", ECHO)
BULK: Final = Work("bulk", "upload", SINK)
DNS: Final = Work("dns", "ask", RESOLVER_PORT)
HELD: Final = Work("held", "trips", ECHO, held=1000)
ALL_WORK: Final = (CONNECTIONS, PING_PONG, BULK, DNS, HELD)


@dataclass(frozen=True, slots=True)
class Subject:
    """One way from the client to the server.

    `backend` is one of pyambient's, "direct" (no proxy) or "explicit" (the client connects to a
    proxy in its pod on purpose); `enrolled` says whose pod is captured, `proxy` who serves it.
    """

    backend: str
    enrolled: str = NOBODY
    proxy: str = NULL

    @property
    def name(self) -> str:
        """What its samples are kept under."""
        return f"{self.backend}/{self.enrolled}/{self.proxy}"

    @property
    def captured(self) -> bool:
        return self.enrolled != NOBODY

    def does(self, work: Work) -> bool:
        """DNS is captured where it is asked, over UDP by all backends but tc."""
        return not work.is_dns or (self.enrolled != SERVER and self.backend != "tc")


DIRECT: Final = Subject("direct", proxy=NO_PROXY)
EXPLICIT: Final = Subject("explicit")


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured in one go, in network namespaces of its own."""

    subject: Subject
    work: Work
    family: str

    @property
    def row(self) -> str:
        """What the samples of all subjects that can be compared are kept under."""
        return f"{self.work.name}/{self.family}"


def subjects(backends: Sequence[str], enrolled: Sequence[str]) -> list[Subject]:
    """Both that captures are compared with, and each backend with each of the pods enrolled."""
    return [DIRECT, EXPLICIT, *(Subject(*pair) for pair in itertools.product(backends, enrolled))]


def cells(chosen: Sequence[Subject], work: Sequence[Work]) -> Iterator[Cell]:
    """A round."""
    for kind, family, subject in itertools.product(work, FAMILIES, chosen):
        if subject.does(kind):
            yield Cell(subject, kind, family)
