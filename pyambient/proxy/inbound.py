"""Port 15008: HBONE tunnels from other proxies, and the connections in them.

A tunnel is a trio task for its handshake and its keep-alive; its connections are callbacks. Who
the peer is, is settled once per tunnel (TLS, then the SPIFFE id against our trust domain), before
a single request is looked at. What it may do, is settled per CONNECT: the target must be this
pod, the policies must allow it, and the app must answer; only then does the peer get its 200.
"""

from __future__ import annotations

import re
import socket
from http import HTTPStatus

import trio
from OpenSSL import SSL

from pyambient.engine.accept import Dial, connect
from pyambient.engine.farewell import linger
from pyambient.engine.handshake import HandshakeFailed, handshake
from pyambient.engine.pacing import Queue
from pyambient.engine.relay import StreamRelay
from pyambient.engine.tls import TlsTransport
from pyambient.engine.tunnel import Tunnel
from pyambient.hbone import Connection, ConnectRequest, Role, Stream
from pyambient.identity.certificate import IdentityError
from pyambient.identity.context import require_alpn
from pyambient.identity.peer import PeerRefused, authenticate_client
from pyambient.mesh import inbound as decisions
from pyambient.model.address import SocketAddress, from_sockaddr
from pyambient.model.numbers import HANDSHAKE_TIMEOUT, HBONE_PORT
from pyambient.model.policy import ConnectionFacts
from pyambient.model.spiffe import SpiffeId
from pyambient.observe.accesslog import ConnectionRecord

from . import sockets
from .records import inbound_record
from .worker import PodScope

# Of one tunnel: a turn of the loop stays below a millisecond.
_REQUESTS_A_TURN = 2

_FORWARDED_HOST = re.compile(r'(?:^|;)\s*host="?([A-Za-z0-9._-]{1,253})"?\s*(?:;|$)', re.IGNORECASE)


def forwarded_host(forwarded: str | None) -> str | None:
    """The `host` parameter of a `forwarded` header (RFC 7239): the service the client meant."""
    found = _FORWARDED_HOST.search(forwarded) if forwarded else None
    return found and found.group(1)


class Inbound:
    """The 15008 listener: takes tunnels, and keeps those that are up."""

    def __init__(self, scope: PodScope) -> None:
        self._scope = scope
        self._tunnels: dict[InboundTunnel, None] = {}
        self._draining = False

    def accepted(self, sock: socket.socket, peer: SocketAddress) -> None:
        """A peer connected; take its socket over."""
        budget = self._scope.budget
        if not budget.may_take(1) or budget.begin_handshake(peer.ip):
            sock.close()
            return
        budget.take(1)
        self._scope.start_soon(self._serve, sock, peer)

    async def _serve(self, sock: socket.socket, peer: SocketAddress) -> None:
        """One tunnel, from its handshake to its end."""
        budget = self._scope.budget
        try:
            try:
                tunnel = await self._handshake(sock, peer)
            finally:
                budget.end_handshake(peer.ip)
            if tunnel is not None:
                await self._run(tunnel)
        finally:
            budget.give(1)

    async def _run(self, tunnel: InboundTunnel) -> None:
        self._tunnels[tunnel] = None
        try:
            await tunnel.run()
        finally:
            del self._tunnels[tunnel]

    async def _handshake(self, sock: socket.socket, peer: SocketAddress) -> InboundTunnel | None:
        """The tunnel of a peer that has proven who it is; None if it has not (logged)."""
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                session, identity = await self._prove(sock)
        except trio.TooSlowError:
            self._fail(sock, peer, f"no TLS handshake in {HANDSHAKE_TIMEOUT:g} s")
        except PeerRefused as refused:
            self._fail(sock, peer, f"identity error: {refused.reason}")
        except IdentityError as unproven:
            self._fail(sock, peer, f"identity error: {unproven}")
        except HandshakeFailed as failed:
            self._fail(sock, peer, f"tls error: {failed}")
            with sock:  # also where the pod ends meanwhile
                await linger(sock)
        except OSError as error:
            self._fail(sock, peer, f"connection failed: {error.strerror}")
        except BaseException:
            sock.close()
            raise
        else:
            return InboundTunnel(self._scope, sock, session, peer, identity)
        sock.close()
        return None

    async def _prove(self, sock: socket.socket) -> tuple[SSL.Connection, SpiffeId]:
        scope = self._scope
        certificate = await scope.certificate()
        context = scope.worker.contexts.server(certificate)
        session = await handshake(sock, context, scope.worker.handshakes, server=True)
        require_alpn(session)
        peer = session.get_peer_certificate(as_cryptography=True)
        return session, authenticate_client(peer, scope.worker.trust_domain)

    def _fail(self, sock: socket.socket, peer: SocketAddress, reason: str) -> None:
        try:
            local = from_sockaddr(sock.getsockname())
        except OSError:
            local = SocketAddress("0.0.0.0", 0)  # noqa: S104 - only a log line's placeholder
        self._scope.worker.access_log.failed(peer, local, "inbound", reason)

    def drain(self) -> None:
        """Say GOAWAY on every tunnel; each closes when its last stream ends."""
        for tunnel in self._tunnels:
            tunnel.tunnel.drain()

    async def wait_over(self) -> None:
        """Wait until the present tunnels are over, their last words included."""
        for tunnel in list(self._tunnels):
            await tunnel.tunnel.over.wait()

    def close(self, reason: str) -> None:
        for tunnel in list(self._tunnels):
            tunnel.tunnel.close(reason)

    def __repr__(self) -> str:
        return f"<Inbound of {self._scope.pod}: {len(self._tunnels)} tunnels>"


def _addressed(sock: socket.socket, scope: PodScope) -> SocketAddress:
    """Where the peer connected to: an address of the pod.

    A redirect leads to another port, and maybe to another address. What conntrack says of it is
    believed for addresses of the pod alone: an app may have rules of its own.
    """
    local = from_sockaddr(sock.getsockname())
    if scope.netfilter and local.port != HBONE_PORT:
        asked = sockets.original_destination(sock, netfilter=True)
        return asked if asked.ip in scope.addresses else local
    return local


class InboundTunnel:
    """One tunnel from a proven peer (hbone.Owner of its connection)."""

    def __init__(
        self,
        scope: PodScope,
        sock: socket.socket,
        session: SSL.Connection,
        peer: SocketAddress,
        identity: SpiffeId,
    ) -> None:
        worker = scope.worker
        self.identity = identity
        self.peer = peer
        self.local = _addressed(sock, scope)
        self._scope = scope
        self._settled = trio.Event()
        self._requests = Queue(worker.loop, _REQUESTS_A_TURN)
        settings = worker.http2.at_distance(sockets.round_trip(sock))
        connection = Connection(Role.SERVER, self, worker.outputs, settings)
        transport = TlsTransport(sock, session, worker.buffers)
        self.tunnel = Tunnel(worker.loop, transport, connection, worker.buffers, peer)
        self.tunnel.unread = scope.budget.unread(peer.ip)
        self.tunnel.on_close = lambda _: self._settled.set()

    async def run(self) -> None:
        """Serve the tunnel until it is closed."""
        self.tunnel.start()
        try:
            with trio.move_on_after(HANDSHAKE_TIMEOUT) as scope:
                await self._settled.wait()
            if scope.cancelled_caught:
                self.tunnel.close(f"no HTTP/2 preface in {HANDSHAKE_TIMEOUT:g} s")
            await self.tunnel.keep_alive()
        finally:
            self.tunnel.close("connection closed due to connection drain")

    def settled(self) -> None:
        self._settled.set()

    def goaway(self, code: int) -> None:
        """The peer opens nothing more; what is open goes on."""

    def drained(self) -> None:
        self.tunnel.finish("drained")

    def refused(self, stream_id: int, status: int, why: str) -> None:
        """The connection itself has answered a request that is no CONNECT."""
        del stream_id
        self._log_refusal(self.local, f"{why} (http status: {status})")

    def _log_refusal(self, destination: SocketAddress, reason: str) -> None:
        self._scope.worker.access_log.failed(self.peer, destination, "inbound", reason)

    def requested(self, stream: Stream, request: ConnectRequest) -> None:
        """A CONNECT arrived: its turn comes."""
        self._requests.call(lambda: self._judge(stream, request))

    def _judge(self, stream: Stream, request: ConnectRequest) -> None:
        """Decide, and dial the app if it may pass."""
        if stream.closed:
            return
        scope = self._scope
        if not scope.budget.may_take(1):
            self.tunnel.connection.refuse(stream, HTTPStatus.SERVICE_UNAVAILABLE)
            self.tunnel.loop.flush_soon(self.tunnel)
            return
        decision = decisions.decide_inbound(
            request.authority,
            decisions.Entrance(self.local.ip, scope.loops),
            scope.workload(),
            scope.worker.view.snapshot,
            self.peer,
            self.identity,
            forwarded_host(request.forwarded),
        )
        if isinstance(decision, decisions.Reject):
            self._log_refusal(self.local, f"{decision.reason} (http status: {decision.status})")
            self.tunnel.connection.refuse(stream, decision.status)
            self.tunnel.loop.flush_soon(self.tunnel)
            return
        record = inbound_record(scope, self.peer, self.local, decision.service)
        record.hbone_authority = request.authority
        record.source_identity = self.identity
        record.destination_identity = scope.identity
        InboundConnection(self, scope, stream, record, decision.facts).begin(decision.target)

    def __repr__(self) -> str:
        return f"<InboundTunnel from {self.identity} at {self.peer}>"


class InboundConnection:
    """One CONNECT that may pass: dial the app, answer, relay."""

    __slots__ = ("_dial", "_owner", "_record", "_relay", "_scope", "_stream", "facts")

    def __init__(
        self,
        owner: InboundTunnel,
        scope: PodScope,
        stream: Stream,
        record: ConnectionRecord,
        facts: ConnectionFacts,
    ) -> None:
        self.facts = facts
        self._owner = owner
        self._scope = scope
        self._stream = stream
        self._record = record
        self._dial: Dial | None = None
        self._relay: StreamRelay | None = None
        scope.track(self, 1)

    def begin(self, target: SocketAddress) -> None:
        worker = self._scope.worker
        try:
            app = sockets.towards_app(self._scope.stock, self._owner.peer, target)
        except OSError as error:
            self._refuse(f"connection failed: {error.strerror}")
            return
        relay = self._relay = StreamRelay(worker.loop, app, self._owner.tunnel)
        relay.stream = self._stream
        relay.reservoir = self._scope.budget.buffered
        relay.on_finished = self._finished
        self._stream.sink = relay
        try:
            connected = connect(app, target)
        except OSError as error:
            self._dial_failed(error)
            return
        if connected:
            self._dialled(None)
        else:
            self._dial = Dial(worker.loop, app, worker.connects, self._dialled)

    @property
    def finished(self) -> bool:
        return self._relay is not None and self._relay.finished

    def abort(self, error: str) -> None:
        if self._relay is not None:
            self._relay.abort(error)

    def _dialled(self, error: OSError | None) -> None:
        relay = self._relay
        assert relay is not None  # noqa: S101 - begin() made it
        if error is not None:
            self._dial_failed(error)
            return
        self._dial = None
        tunnel = self._owner.tunnel
        headers = (("baggage", self._scope.baggage_of(self._record.destination_workload)),)
        tunnel.connection.accept(self._stream, headers)
        tunnel.loop.flush_soon(tunnel)
        self._scope.worker.access_log.opened(self._record)
        relay.watch()
        relay.open()

    def _dial_failed(self, error: OSError) -> None:
        """The app does not answer: 503, and nothing else happened."""
        relay = self._relay
        assert relay is not None  # noqa: S101 - begin() made it
        self._dial = None
        relay.on_finished = None
        relay.stream = None
        relay.abort("")
        self._refuse(f"connection failed: {error.strerror}")

    def _refuse(self, reason: str) -> None:
        self._record.error = f"{reason} (http status: 503)"
        self._owner.tunnel.connection.refuse(self._stream, 503)
        self._owner.tunnel.loop.flush_soon(self._owner.tunnel)
        self._end()

    def _finished(self, relay: StreamRelay) -> None:
        """The relay ended; also before the app was reached, when the peer gave up."""
        if self._dial is not None:
            self._dial.cancel()
        record = self._record
        record.bytes_sent, record.bytes_received = relay.bytes_up, relay.bytes_down
        record.error = relay.error
        self._end()

    def _end(self) -> None:
        self._scope.finish(self, self._record)

    def __repr__(self) -> str:
        return f"<InboundConnection {self._record.source} to {self._record.hbone_authority}>"
