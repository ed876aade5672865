"""Port 15001: connections that apps of the pod made, captured on their way out.

The original destination decides (`mesh.route`): through a tunnel, plainly to one address, or not
at all; a pod of the same proxy may be reached without the tunnel (`direct`). A tunnelled
connection's story: the pool gives a tunnel, the CONNECT goes out, the peer answers 200, bytes flow.
Until then nothing is read from the app, and a failure at any step reaches it as a reset, as a
refused connection would.
"""

from __future__ import annotations

import random
import socket

from pyambient.engine.deadlines import Deadline
from pyambient.engine.relay import StreamRelay, reset
from pyambient.engine.tunnel import Tunnel
from pyambient.hbone import ConnectRequest, ErrorCode, Headers
from pyambient.mesh import route
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import ANSWER_TIMEOUT
from pyambient.model.spiffe import SpiffeId
from pyambient.observe.accesslog import ConnectionRecord

from . import direct, sockets
from .neighbours import Neighbours
from .plain import PLAIN_DESCRIPTORS, PlainConnection
from .pool import Pool, PoolKey, Waiter
from .records import outbound_record
from .worker import PodScope


class Outbound:
    """The 15001 listener's decisions."""

    def __init__(self, scope: PodScope, pool: Pool, neighbours: Neighbours | None = None) -> None:
        """With `neighbours`, those of them that can be are reached without a tunnel."""
        self._scope = scope
        self._pool = pool
        self._neighbours = neighbours

    def accepted(self, sock: socket.socket, peer: SocketAddress) -> None:
        """An app connected; take its socket over."""
        scope = self._scope
        if not scope.budget.may_take(PLAIN_DESCRIPTORS):
            reset(sock)
            return
        destination = sockets.original_destination(sock, netfilter=scope.netfilter)
        own = scope.workload()
        if own is None:
            self._refuse(sock, peer, destination, "the pod is not enrolled any more")
            return
        record = outbound_record(peer, own, destination)
        snapshot = scope.worker.view.snapshot
        decision = route.decide_outbound(snapshot, own, destination, loops=scope.loops)
        match decision:
            case route.Tunnel():
                self._to_the_mesh(sock, record, decision)
            case route.Plain():
                self._pass_on(sock, record, decision)
            case route.Refuse():
                self._refuse(sock, peer, destination, decision.reason)

    def _to_the_mesh(
        self, sock: socket.socket, record: ConnectionRecord, decision: route.Tunnel
    ) -> None:
        record.destination_workload = decision.workload
        if decision.service is not None:
            record.destination_service = decision.service.hostname
        neighbour = None
        if self._neighbours is not None:
            neighbour = self._neighbours.reached(self._scope, record.source, decision)
        if neighbour is not None:
            direct.begin(self._scope, sock, record, decision, neighbour)
        else:
            Tunnelled(self._scope, self._pool, sock, record).begin(decision)

    def _pass_on(
        self, sock: socket.socket, record: ConnectionRecord, decision: route.Plain
    ) -> None:
        record.destination = decision.address
        record.destination_workload = decision.workload
        if decision.service is not None:
            record.destination_service = decision.service.hostname
        connection = PlainConnection(self._scope, sock, record)
        connection.begin(lambda: self._far_socket(decision.address), decision.address)

    def _far_socket(self, destination: SocketAddress) -> socket.socket:
        far = sockets.outbound(self._scope.stock, destination.family)
        sockets.keep_alive(far)
        return far

    def _refuse(
        self, sock: socket.socket, peer: SocketAddress, destination: SocketAddress, reason: str
    ) -> None:
        self._scope.worker.access_log.failed(peer, destination, "outbound", reason)
        reset(sock)

    def __repr__(self) -> str:
        return f"<Outbound of {self._scope.pod}>"


class Tunnelled:
    """One captured connection on its way through a tunnel."""

    __slots__ = ("_answer", "_decision", "_pool", "_record", "_relay", "_scope", "_sock")

    def __init__(
        self, scope: PodScope, pool: Pool, sock: socket.socket, record: ConnectionRecord
    ) -> None:
        self._scope = scope
        self._pool = pool
        self._sock = sock
        self._record = record
        self._relay: StreamRelay | None = None
        self._answer: Deadline | None = None
        self._decision: route.Tunnel | None = None
        scope.track(self, 1)

    def begin(self, decision: route.Tunnel) -> None:
        record = self._record
        self._decision = decision
        record.destination = decision.next_hop
        record.hbone_authority = decision.authority
        key = PoolKey(self._scope.identity, decision.expected, record.source.ip, decision.next_hop)
        self._pool.request(key, Waiter(self._ready, self._failed))

    @property
    def facts(self) -> None:
        """Policies are asked at the destination alone."""
        return None

    @property
    def finished(self) -> bool:
        return self._relay is not None and self._relay.finished

    def abort(self, error: str) -> None:
        if self._relay is not None:
            self._relay.abort(error)

    def _failed(self, reason: str) -> None:
        """No tunnel: the app sees a reset."""
        self._record.error = reason
        reset(self._sock)
        self._end()

    def _ready(self, tunnel: Tunnel, peer: SpiffeId) -> None:
        worker, record = self._scope.worker, self._record
        record.source_identity = self._scope.identity
        record.destination_identity = peer
        relay = self._relay = StreamRelay(worker.loop, self._sock, tunnel)
        relay.reservoir = self._scope.budget.buffered
        relay.on_answer = self._answered
        relay.on_finished = self._relay_finished
        relay.stream = tunnel.connection.open(self._request(), relay)
        relay.watch()
        worker.loop.flush_soon(tunnel)
        worker.access_log.opened(record)
        self._answer = worker.answers.start(self._unanswered)

    def _request(self) -> ConnectRequest:
        decision, record = self._decision, self._record
        assert decision is not None  # noqa: S101 - begin() comes first
        forwarded = f'for="{record.source}"'
        if decision.service is not None:
            forwarded += f";host={decision.service.hostname}"
        return ConnectRequest(
            authority=decision.authority,
            baggage=self._scope.baggage_of(record.source_workload),
            forwarded=forwarded,
            traceparent=_traceparent(),
        )

    def _answered(self, relay: StreamRelay, status: int, _headers: Headers) -> None:
        if self._answer is not None:
            self._answer.cancel()
            self._answer = None
        relay.on_answer = None
        if status == 200:
            relay.open()
        else:
            relay.abort(f"http status: {status}", ErrorCode.CANCEL)

    def _unanswered(self) -> None:
        self.abort(f"the peer has not answered CONNECT in {ANSWER_TIMEOUT:g} s")

    def _relay_finished(self, relay: StreamRelay) -> None:
        if self._answer is not None:
            self._answer.cancel()
        record = self._record
        record.bytes_sent, record.bytes_received = relay.bytes_up, relay.bytes_down
        record.error = relay.error
        self._end()

    def _end(self) -> None:
        self._scope.finish(self, self._record)

    def __repr__(self) -> str:
        return f"<Tunnelled {self._record.source} to {self._record.hbone_authority}>"


def _traceparent() -> str:
    """A trace of its own for each connection (W3C); unguessable it need not be."""
    bits = random.getrandbits(192)
    return f"00-{bits >> 64:032x}-{bits & 0xFFFF_FFFF_FFFF_FFFF:016x}-00"
