"""The tunnels of one pod towards others, shared by its connections.

General theory of operation
---------------------------
A tunnel is shared by connections with the same key: who we are, whom we may meet, from which
address, to which next hop. Pods never share tunnels, so nothing of one can reach another.

`request` answers at once when a tunnel has room for another stream: no task, no await. Otherwise
the connection waits in the key's lane while one trio task opens a tunnel (at most one opening per
lane); success serves the waiters in order, failure wakes all of them with the same reason.

A tunnel that is saturated by bulk gets no more connections while another may be opened beside it:
messages of theirs would wait behind whole buffers of it, here and in the network.

A tunnel leaves its lane when the peer says GOAWAY or the connection ends, and is closed when it
has had no stream for five minutes.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import trio

from pyambient.engine.handshake import HandshakeFailed, handshake
from pyambient.engine.tls import TlsTransport
from pyambient.engine.tunnel import Tunnel
from pyambient.hbone import Connection, ConnectRequest, Role, Stream
from pyambient.identity.certificate import IdentityError
from pyambient.identity.context import require_alpn
from pyambient.identity.peer import PeerRefused, authenticate_server
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import (
    CONNECT_TIMEOUT,
    HANDSHAKE_TIMEOUT,
    HBONE_PORT,
    POOL_IDLE_TIMEOUT,
)
from pyambient.model.spiffe import SpiffeId

from . import sockets
from .worker import PodScope

_WAITERS_MAX = 4096
_IDLE_CHECK = 30.0
# Tunnels of one key that may be saturated before connections are put on them all the same.
_SATURATED_MAX = 4


class PoolKey(NamedTuple):
    """What connections must agree on to share a tunnel."""

    source: SpiffeId
    expected: frozenset[SpiffeId]
    source_ip: str
    next_hop: SocketAddress


class Waiter(NamedTuple):
    """A connection that wants a tunnel: exactly one of the two is called, once."""

    ready: Callable[[Tunnel, SpiffeId], None]
    failed: Callable[[str], None]


class TunnelFailed(Exception):
    """No tunnel could be opened; the text is what to log."""


class _Lane:
    """The tunnels of one key, and who waits for the next."""

    __slots__ = ("opening", "tunnels", "waiters")

    def __init__(self) -> None:
        self.tunnels: list[_Pooled] = []
        self.waiters: deque[Waiter] = deque()
        self.opening = False

    def free_tunnel(self, *, at_any_price: bool) -> _Pooled | None:
        """A tunnel with room for a stream; a saturated one if there are many, or at any price."""
        saturated = None
        count = 0
        for pooled in self.tunnels:
            if pooled.tunnel is not None and pooled.tunnel.connection.can_open():
                if not pooled.tunnel.saturated:
                    return pooled
                saturated = saturated or pooled
                count += 1
        return saturated if at_any_price or count >= _SATURATED_MAX else None


class _Pooled:
    """A tunnel in a lane; it owns the tunnel's connection (hbone.Owner)."""

    def __init__(self, pool: Pool, key: PoolKey) -> None:
        self.pool = pool
        self.key = key
        self.settled_event = trio.Event()
        self.tunnel: Tunnel | None = None
        self.peer: SpiffeId | None = None
        self.idle_since: float | None = None

    def requested(self, stream: Stream, request: ConnectRequest) -> None:
        """A server opens no streams towards its client; hbone has refused it already."""

    def refused(self, stream_id: int, status: int, why: str) -> None:
        """Only servers refuse."""

    def settled(self) -> None:
        self.settled_event.set()

    def goaway(self, code: int) -> None:
        self.pool.leave(self, f"the peer said GOAWAY {code}")

    def drained(self) -> None:
        if self.tunnel is not None:
            self.tunnel.finish("drained")


class Pool:
    """The client tunnels of one pod; see the top of this file."""

    def __init__(self, scope: PodScope) -> None:
        self._scope = scope
        self._lanes: dict[PoolKey, _Lane] = {}
        self._attended: set[Tunnel] = set()

    def request(self, key: PoolKey, waiter: Waiter) -> None:
        """Give `waiter` a tunnel with room for a stream, now or as soon as there is one."""
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane()
        pooled = lane.free_tunnel(at_any_price=False)
        if pooled is not None:
            self._serve(pooled, waiter)
            return
        if len(lane.waiters) >= _WAITERS_MAX:
            waiter.failed(f"{_WAITERS_MAX} connections wait for a tunnel to {key.next_hop} already")
            return
        lane.waiters.append(waiter)
        if not lane.opening:
            lane.opening = True
            self._scope.start_soon(self._open, key, lane)

    def _serve(self, pooled: _Pooled, waiter: Waiter) -> None:
        assert pooled.tunnel is not None and pooled.peer is not None  # noqa: S101, PT018 - in a lane
        pooled.idle_since = None
        waiter.ready(pooled.tunnel, pooled.peer)

    async def _open(self, key: PoolKey, lane: _Lane) -> None:
        """Open tunnels for a lane until nobody waits, or one cannot be opened."""
        failure = "connection closed due to connection drain"
        try:
            while lane.waiters:
                pooled = await self._connect(key)
                lane.tunnels.append(pooled)
                self._serve_waiters(pooled, lane)
        except TunnelFailed as error:
            failure = str(error)
        finally:
            lane.opening = False
            while lane.waiters:
                self._serve_or_fail(lane, lane.waiters.popleft(), failure)
            self._drop_if_empty(key, lane)

    def _serve_or_fail(self, lane: _Lane, waiter: Waiter, failure: str) -> None:
        """What could not be opened was perhaps only meant to spare a tunnel that is busy."""
        pooled = lane.free_tunnel(at_any_price=True)
        if pooled is not None:
            self._serve(pooled, waiter)
        else:
            waiter.failed(failure)

    def _serve_waiters(self, pooled: _Pooled, lane: _Lane) -> None:
        tunnel = pooled.tunnel
        while lane.waiters and tunnel is not None and tunnel.connection.can_open():
            self._serve(pooled, lane.waiters.popleft())

    async def _connect(self, key: PoolKey) -> _Pooled:
        """A tunnel whose peer is proven and has sent its SETTINGS; TunnelFailed otherwise."""
        sock = self._socket(key)
        try:
            await _connect_socket(sock, self._place_of(key.next_hop))
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                return await self._secure(sock, key)
        except trio.TooSlowError:
            reason = f"no TLS and HTTP/2 answer from {key.next_hop} in {HANDSHAKE_TIMEOUT:g} s"
        except PeerRefused as error:
            reason = f"identity error: {error.reason}"
        except IdentityError as error:
            reason = f"identity error: {error}"
        except HandshakeFailed as error:
            reason = f"tls error: {error}"
        except OSError as error:
            reason = str(_failed(error))
        except BaseException:
            sock.close()
            raise
        sock.close()
        raise TunnelFailed(reason)

    def _place_of(self, next_hop: SocketAddress) -> SocketAddress:
        """Where that is from inside the pod: nothing redirects what it sends to itself."""
        scope = self._scope
        if next_hop.port == HBONE_PORT and next_hop.ip in scope.addresses:
            return SocketAddress(next_hop.ip, scope.details.ports.hbone)
        return next_hop

    def _socket(self, key: PoolKey) -> socket.socket:
        try:
            return sockets.outbound(self._scope.stock, key.next_hop.family)
        except OSError as error:
            raise _failed(error) from None

    async def _secure(self, sock: socket.socket, key: PoolKey) -> _Pooled:
        worker = self._scope.worker
        certificate = await self._scope.certificate()
        context = worker.contexts.client(certificate)
        session = await handshake(sock, context, worker.handshakes, server=False)
        require_alpn(session)
        pooled = _Pooled(self, key)
        peer = session.get_peer_certificate(as_cryptography=True)
        pooled.peer = authenticate_server(peer, key.expected)
        settings = worker.http2.at_distance(sockets.round_trip(sock))
        connection = Connection(Role.CLIENT, pooled, worker.outputs, settings)
        transport = TlsTransport(sock, session, worker.buffers)
        tunnel = Tunnel(worker.loop, transport, connection, worker.buffers, key.next_hop)
        tunnel.unread = self._scope.budget.unread(key.next_hop.ip)
        tunnel.on_close = lambda closed: self._closed(pooled, closed)
        tunnel.start()
        try:
            await self._wait_settled(pooled, tunnel)
        except BaseException:
            tunnel.close("given up before the peer's SETTINGS")
            raise
        pooled.tunnel = tunnel
        self._attended.add(tunnel)
        self._scope.start_soon(self._attend, tunnel)
        return pooled

    async def _attend(self, tunnel: Tunnel) -> None:
        """One tunnel, in its lane and after, until it is over."""
        try:
            await tunnel.keep_alive()
        finally:
            self._attended.remove(tunnel)
            tunnel.close("connection closed due to connection drain")

    async def _wait_settled(self, pooled: _Pooled, tunnel: Tunnel) -> None:
        async with trio.open_nursery() as nursery:

            async def stop_when_closed() -> None:
                await tunnel.closed.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(stop_when_closed)
            await pooled.settled_event.wait()
            nursery.cancel_scope.cancel()
        if tunnel.is_closed:
            # The server judges our certificate after our side of the handshake is done
            # (RFC 8446 section 4.4.2.4), so its alert arrives here.
            raise HandshakeFailed(tunnel.reason.removeprefix("tls error: "))

    def _closed(self, pooled: _Pooled, tunnel: Tunnel) -> None:
        self.leave(pooled, tunnel.reason)

    def leave(self, pooled: _Pooled, _reason: str) -> None:
        """Take a tunnel out of its lane: nothing more is opened on it."""
        lane = self._lanes.get(pooled.key)
        if lane is not None and pooled in lane.tunnels:
            lane.tunnels.remove(pooled)
            self._drop_if_empty(pooled.key, lane)

    def _drop_if_empty(self, key: PoolKey, lane: _Lane) -> None:
        if not (lane.tunnels or lane.waiters or lane.opening) and self._lanes.get(key) is lane:
            del self._lanes[key]

    async def release_idle(self) -> None:
        """Close tunnels that carried nothing for five minutes, forever."""
        while True:
            await trio.sleep(_IDLE_CHECK)
            now = trio.current_time()
            self._scope.release_stock()
            for pooled in [p for lane in self._lanes.values() for p in lane.tunnels]:
                self._release_if_idle(pooled, now)

    def _release_if_idle(self, pooled: _Pooled, now: float) -> None:
        tunnel = pooled.tunnel
        if tunnel is None or tunnel.connection.open_count:
            pooled.idle_since = None
        elif pooled.idle_since is None:
            pooled.idle_since = now
        elif now - pooled.idle_since >= POOL_IDLE_TIMEOUT:
            self.leave(pooled, "idle")
            tunnel.drain()

    def drain(self) -> None:
        """Say GOAWAY on every tunnel; each closes when its last stream ends."""
        for pooled in [p for lane in self._lanes.values() for p in lane.tunnels]:
            if pooled.tunnel is not None:
                pooled.tunnel.drain()

    async def wait_over(self) -> None:
        """Wait until the present tunnels are over, their last words included."""
        for tunnel in list(self._attended):
            await tunnel.over.wait()

    def close(self, reason: str) -> None:
        """End every tunnel now."""
        for tunnel in list(self._attended):
            tunnel.close(reason)

    def __repr__(self) -> str:
        tunnels = sum(len(lane.tunnels) for lane in self._lanes.values())
        return f"<Pool of {self._scope.pod}: {tunnels} tunnels, {len(self._lanes)} keys>"


def _failed(error: OSError) -> TunnelFailed:
    return TunnelFailed(f"connection failed: {error.strerror or error}")


async def _connect_socket(sock: socket.socket, destination: SocketAddress) -> None:
    """Connect non-blocking `sock`; TunnelFailed after 10 s, OSError if refused."""
    with trio.move_on_after(CONNECT_TIMEOUT):
        code = sock.connect_ex(destination.sockaddr())
        if code == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        return
    raise TunnelFailed(
        "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: "
        f"no answer from {destination} in {CONNECT_TIMEOUT:g} s"
    )
