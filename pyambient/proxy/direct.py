"""A connection between two pods of this proxy, joined without a tunnel (`--same-node direct`).

It is one connection and has two ends, as a tunnelled one has: each pod counts it, lists it, may
end it and has its line in the access log. What differs is what lies between: one relay instead of
two and a stream. The source's end is a `PlainConnection`; the destination's is an `Arrival`, which
is asked about when policies change.
"""

from __future__ import annotations

import socket

from pyambient.engine.relay import reset
from pyambient.identity.certificate import join_ids
from pyambient.mesh import inbound as decisions
from pyambient.mesh.route import Tunnel
from pyambient.model.address import SocketAddress
from pyambient.model.policy import ConnectionFacts
from pyambient.observe.accesslog import ConnectionRecord

from . import sockets
from .plain import PlainConnection
from .records import inbound_record
from .worker import PodScope

# Policies ask for no source port, and a decision is kept for all that it is the same for.
_ANY_PORT = 0


class DirectConnection(PlainConnection):
    """The source's end: the app's socket here, and the one towards the app there."""

    __slots__ = ("_arrival",)

    def __init__(
        self, scope: PodScope, near: socket.socket, record: ConnectionRecord, arrival: Arrival
    ) -> None:
        super().__init__(scope, near, record, descriptors=1)
        self._arrival = arrival
        arrival.connection = self

    def _log_opened(self) -> None:
        super()._log_opened()
        self._arrival.log_opened()

    def _end(self) -> None:
        super()._end()
        self._arrival.end(self._record)

    def __repr__(self) -> str:
        return f"<DirectConnection {self._record.source} to {self._arrival!r}>"


class Arrival:
    """The destination's end."""

    __slots__ = ("_record", "_scope", "connection", "facts")

    def __init__(self, scope: PodScope, record: ConnectionRecord, facts: ConnectionFacts) -> None:
        self.facts = facts
        self.connection: DirectConnection | None = None
        self._scope = scope
        self._record = record
        scope.track(self, 1)

    @property
    def finished(self) -> bool:
        return self.connection is None or self.connection.finished

    def abort(self, error: str) -> None:
        if self.connection is not None:
            self.connection.abort(error)

    def log_opened(self) -> None:
        self._scope.worker.access_log.opened(self._record)

    def end(self, outbound: ConnectionRecord) -> None:
        """The connection is over; what one app has sent the other one has received."""
        record, self.connection = self._record, None
        record.bytes_sent, record.bytes_received = outbound.bytes_received, outbound.bytes_sent
        record.error = outbound.error
        self._scope.finish(self, record)

    def __repr__(self) -> str:
        return f"<Arrival at {self._record.destination}>"


def begin(
    source: PodScope,
    near: socket.socket,
    record: ConnectionRecord,
    route: Tunnel,
    destination: PodScope,
) -> None:
    """Judge the connection as the destination's own listener would, and join the apps.

    Takes over `near`, the app's socket. `route` leads to `destination`, which is another pod of
    this proxy, or the same one. A refusal reaches the app as a reset, and both pods' logs.
    """
    target = route.target
    assert target is not None  # noqa: S101 - Neighbours has asked
    record.destination = target
    refusal = _unexpected(route, destination)
    if refusal:
        _refuse(source, near, record, refusal)
        return
    record.source_identity, record.destination_identity = source.identity, destination.identity
    if not destination.budget.may_take(1):
        _refuse(source, near, record, f"pod {destination.pod} has no room for a connection")
        return
    decision = _decide(source, record.source, route, target, destination)
    if isinstance(decision, decisions.Reject):
        reason = decision.reason
        source.worker.access_log.failed(record.source, target, "inbound", reason)
        _refuse(source, near, record, reason)
        return
    theirs = inbound_record(destination, record.source, target, decision.service)
    theirs.source_identity, theirs.destination_identity = source.identity, destination.identity
    arrival = Arrival(destination, theirs, decision.facts)
    connection = DirectConnection(source, near, record, arrival)
    connection.begin(
        lambda: sockets.towards_app(destination.stock, record.source, decision.target),
        decision.target,
    )


def _unexpected(route: Tunnel, destination: PodScope) -> str:
    """Why the pod is not whom the mesh expects there; empty if it is."""
    found, expected = destination.identity, route.expected
    if found in expected:
        return ""
    return f"identity error: the server is {found}, expected {join_ids(expected)}"


def _decide(
    source: PodScope,
    peer: SocketAddress,
    route: Tunnel,
    target: SocketAddress,
    destination: PodScope,
) -> decisions.Decision:
    return decisions.decide_inbound(
        route.authority,
        decisions.Entrance(target.ip, destination.loops),
        destination.workload(),
        destination.worker.view.snapshot,
        SocketAddress(peer.ip, _ANY_PORT),
        source.identity,
        None if route.service is None else route.service.hostname,
    )


def _refuse(source: PodScope, near: socket.socket, record: ConnectionRecord, reason: str) -> None:
    record.error = reason
    source.worker.access_log.complete(record)
    reset(near)
