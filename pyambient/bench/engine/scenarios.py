"""Work that is more than one run of the load tool: sharing, crowds, memory, hostile neighbours."""

from __future__ import annotations

import time
from collections.abc import Callable

from OpenSSL import SSL

from pyambient.bench.load import Load
from pyambient.bench.processes import resident_bytes
from pyambient.bench.rounds import Results, Sample
from pyambient.identity.context import ALPN
from pyambient.model.numbers import HBONE_PORT

from .bed import NEIGHBOUR, SERVER_IP_FOR_NEIGHBOUR, SERVER_IP_FOR_STRANGER, STRANGER
from .subjects import ECHO, OURS_UNSHARED, SINK, SOURCE, Subject

MEMORY, SHARED, BULK_ALONE = "memory", "round trips beside an upload", "that upload alone"
CROWD_TRIPS, CALM_TRIPS = "100 active among idle connections", "100 active alone"
CROWD_CONNECTIONS, CALM_CONNECTIONS = "connections among idle ones", "connections alone"
QUIET, DROPPED, HANDSHAKES, DEAF = (
    "round trips, nobody hostile",
    "round trips, a pod opens and drops connections",
    "round trips, a peer begins handshakes without end",
    "round trips, a pod never reads",
)
_SETTLE = 0.3
_MEASURED_CONNECTIONS = 2000
_MEASURED_TUNNELS = 100
_VICTIMS = 4
_AT_ONCE = 32


def memory(subject: Subject) -> Sample:
    """RSS of the larger proxy before any connection, and what an idle connection adds to each.

    What is touched once, whatever the number of connections, is touched before they are counted.
    """
    count = _MEASURED_TUNNELS if subject.name == OURS_UNSHARED else _MEASURED_CONNECTIONS
    base = max(_resident(subject))
    subject.measure("upload", SINK, 1, _SETTLE)
    subject.measure("download", SOURCE, 1, _SETTLE)
    before = _resident(subject)
    idle = subject.load("idle", ECHO, count)
    idle.wait_warm()
    time.sleep(_SETTLE)
    after = _resident(subject)
    idle.end()
    added = [(b - a) / count for a, b in zip(before, after, strict=True)]
    return {"base": base, "client": added[0], "server": added[1]}


def _resident(subject: Subject) -> list[int]:
    return [resident_bytes(process.pid) for process in subject.proxies]


def share(subject: Subject, seconds: float, results: Results) -> None:
    """Round trips and an upload through one tunnel; and the upload alone, right before."""
    alone = subject.measure("upload", SINK, 1, seconds)
    upload = subject.load("upload", SINK, 1, seconds)
    trips = subject.load("trips", ECHO, _VICTIMS, seconds)
    upload.wait_warm()
    trips.wait_warm()
    bulk, small = upload.result(), trips.result()
    results.add(BULK_ALONE, subject.name, alone)
    results.add(SHARED, subject.name, {**small, "bulk": bulk["bytes"] / bulk["seconds"]})


def crowd(subject: Subject, idle: int, seconds: float, results: Results) -> None:
    """Round trips and new connections, with and without a crowd of idle connections."""
    results.add(CALM_TRIPS, subject.name, subject.measure("trips", ECHO, 100, seconds))
    calm = subject.measure("connections", ECHO, 16, seconds)
    results.add(CALM_CONNECTIONS, subject.name, calm)
    held = subject.load("idle", ECHO, idle)
    held.wait_warm()
    results.add(CROWD_TRIPS, subject.name, subject.measure("trips", ECHO, 100, seconds))
    crowded = subject.measure("connections", ECHO, 16, seconds)
    results.add(CROWD_CONNECTIONS, subject.name, crowded)
    held.end()


def hostility(subject: Subject, seconds: float, results: Results) -> None:
    """A pod's round trips: alone, and while another pod or a peer is hostile in three ways."""
    hello = subject.bed.work / "client-hello"
    hello.write_bytes(client_hello())
    forever = 10 * seconds
    attacks: dict[str, Callable[[], Load]] = {
        DROPPED: lambda: subject.hostile_load(
            NEIGHBOUR, "flood", SERVER_IP_FOR_NEIGHBOUR, ECHO, _AT_ONCE, forever
        ),
        HANDSHAKES: lambda: subject.hostile_load(
            STRANGER, "flood", SERVER_IP_FOR_STRANGER, HBONE_PORT, _AT_ONCE, forever, hello
        ),
        DEAF: lambda: subject.hostile_load(
            NEIGHBOUR, "deaf", SERVER_IP_FOR_NEIGHBOUR, SOURCE, _AT_ONCE
        ),
    }
    results.add(QUIET, subject.name, subject.measure("trips", ECHO, _VICTIMS, seconds))
    for name, attack in attacks.items():
        hostile = attack()
        hostile.wait_warm()
        results.add(name, subject.name, subject.measure("trips", ECHO, _VICTIMS, seconds))
        hostile.end()


def client_hello() -> bytes:
    """The first flight of a TLS client: what costs a server a handshake, and its sender nothing."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_alpn_protos([ALPN])
    session = SSL.Connection(context, None)
    session.set_connect_state()
    try:
        session.do_handshake()
    except SSL.WantReadError:
        return session.bio_read(1 << 16)
    raise AssertionError("unreachable")
