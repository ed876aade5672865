"""What is measured: work, subjects that do it, and a cell, which is one of each in one family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyambient.model.numbers import RESOLVER_PORT

APP_PORT: Final = 9000
ECHO, SINK, HOST = APP_PORT, APP_PORT + 1, APP_PORT + 3
CLIENT, SERVER, BOTH, NOBODY = "client", "server", "both", "nobody"
OTHERS: Final = "others"  # another pod of the node, and neither of the two that speak
NULL, REAL, NO_PROXY = "null", "real", "none"
PROXIES: Final = (NULL, REAL)
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
    proxy in its pod on purpose); `enrolled` says whose pod is captured, `proxy` who serves it: the
    one in C ("null") or pyambient's own ("real").
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
        return self.enrolled not in (NOBODY, OTHERS)

    def does(self, work: Work) -> bool:
        """DNS is captured where it is asked."""
        return not work.is_dns or self.enrolled != SERVER


DIRECT: Final = Subject("direct", proxy=NO_PROXY)
EXPLICIT: Final = Subject("explicit")


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured in one go, in network namespaces of its own.

    `excluded` CIDRs, to which nobody connects, are kept from the capture, where that is what is
    measured. `crowd` is how many pods of the node are enrolled, and by which backend.
    """

    subject: Subject
    work: Work
    family: str
    excluded: int | None = None
    crowd: tuple[int, str] | None = None

    @property
    def row(self) -> str:
        """What the samples of all subjects that can be compared are kept under."""
        if self.excluded is not None:
            return excluding(self.excluded, self.family)
        if self.crowd is not None:
            return beside(*self.crowd)
        return f"{self.work.name}/{self.family}"


def excluding(count: int, family: str) -> str:
    """The row of connections beside exclusions."""
    return f"{CONNECTIONS.name}/{family}/{count} CIDRs"


def beside(count: int, backend: str) -> str:
    """The row of connections of one of so many pods that are enrolled."""
    return f"{CONNECTIONS.name}/v4/{count} pods by {backend}"


def enrolling(place: int) -> str:
    """The row of the enrolment of a pod that is this one in turn."""
    return f"enrolment/{place}"
