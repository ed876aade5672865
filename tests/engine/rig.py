"""Two ends of one tunnel on one loop, with plain TCP sockets at both of them."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from OpenSSL import SSL

from pyambient.engine.handshake import handshake
from pyambient.engine.loop import Loop
from pyambient.engine.pacing import Pacer
from pyambient.engine.relay import StreamRelay
from pyambient.engine.tls import SharedBuffers, TlsTransport
from pyambient.engine.tunnel import Tunnel
from pyambient.hbone import Connection, ConnectRequest, OutputPool, Role, Stream
from pyambient.identity.ca import EmbeddedAuthority
from pyambient.identity.context import client_context, server_context
from pyambient.model.address import SocketAddress
from pyambient.model.spiffe import SpiffeId
from tests.bed.patience import patience

NOWHERE = SocketAddress("192.0.2.1", 15008)
CLIENT = SpiffeId("cluster.local", "default", "client")
SERVER = SpiffeId("cluster.local", "default", "server")
HOSTS = {"v4": "127.0.0.1", "v6": "::1"}


def tcp_pair(host: str = HOSTS["v4"]) -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets: the app's (blocking) and the proxy's (not).

    A socketpair knows no RST.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        app = socket.create_connection(server.getsockname()[:2])
        ours, _ = server.accept()
    app.settimeout(10)
    ours.setblocking(False)
    return app, ours


class End:
    """One end: its tunnel, and what its connection told (hbone.Owner)."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.told: list[str] = []
        self.up = trio.Event()
        self.tunnel: Tunnel

    def requested(self, stream: Stream, request: ConnectRequest) -> None:
        self.rig.requested(stream, request)

    def refused(self, _stream_id: int, status: int, _why: str) -> None:
        self.told.append(f"refused {status}")

    def settled(self) -> None:
        self.up.set()

    def goaway(self, code: int) -> None:
        self.told.append(f"goaway {code}")

    def drained(self) -> None:
        self.told.append("drained")
        self.tunnel.finish("drained")


class Rig:
    """A client and a server tunnel; `open()` gives the app sockets of a relayed connection."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.buffers = SharedBuffers()
        self.outputs = OutputPool()
        self.client, self.server = End(self), End(self)
        self.relays: list[StreamRelay] = []
        self._waiting: list[socket.socket] = []
        self.accept = True
        self.server_relays: list[StreamRelay] = []

    async def connect(self, authority: EmbeddedAuthority, nursery: trio.Nursery) -> None:
        """Handshake over TCP and start both tunnels; `nursery` has their tasks."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
        sessions = {}

        async def shake(end: End, sock: socket.socket, context: SSL.Context, role: Role) -> None:
            sock.setblocking(False)
            server = role is Role.SERVER
            sessions[end] = await handshake(sock, context, Pacer(self.loop), server=server)

        async with trio.open_nursery() as shaking:
            context = client_context(await authority.sign(CLIENT))
            shaking.start_soon(shake, self.client, near, context, Role.CLIENT)
            context = server_context(await authority.sign(SERVER))
            shaking.start_soon(shake, self.server, far, context, Role.SERVER)
        for end, sock, role in (
            (self.client, near, Role.CLIENT),
            (self.server, far, Role.SERVER),
        ):
            transport = TlsTransport(sock, sessions[end], self.buffers)
            connection = Connection(role, end, self.outputs)
            end.tunnel = Tunnel(self.loop, transport, connection, self.buffers, NOWHERE)
            end.tunnel.start()
            nursery.start_soon(end.tunnel.keep_alive)
        await self.client.up.wait()

    def open(self) -> tuple[socket.socket, socket.socket]:
        """Relay a connection; the app sockets of the client's side and of the server's."""
        app, near = tcp_pair()
        server_app, far = tcp_pair()
        self._waiting.append(far)
        relay = StreamRelay(self.loop, near, self.client.tunnel)
        relay.on_answer = self._answered
        request = ConnectRequest("192.0.2.1:80", "", "", "")
        relay.stream = self.client.tunnel.connection.open(request, relay)
        relay.watch()
        self.loop.flush_soon(self.client.tunnel)
        self.relays.append(relay)
        return app, server_app

    def _answered(self, relay: StreamRelay, status: int, _headers: object) -> None:
        if status == 200:
            relay.open()
        else:
            relay.abort(f"http status: {status}")

    def requested(self, stream: Stream, _request: ConnectRequest) -> None:
        tunnel = self.server.tunnel
        far = self._waiting.pop(0)
        if not self.accept:
            tunnel.connection.refuse(stream, 503)
            far.close()
            return
        relay = StreamRelay(self.loop, far, tunnel)
        relay.stream = stream
        stream.sink = relay
        tunnel.connection.accept(stream)
        self.server_relays.append(relay)
        relay.watch()
        relay.open()


def rigged(authority: EmbeddedAuthority, test: Callable[[Rig], Awaitable[None]]) -> None:
    """Run `test(rig)` with both tunnels up; bounded in time."""
    loop = Loop()

    async def main() -> None:
        rig = Rig(loop)
        async with trio.open_nursery() as nursery:
            with trio.fail_after(patience(30)):
                await rig.connect(authority, nursery)
                await test(rig)
            rig.client.tunnel.close("end of the test")
            await trio.sleep(0.02)
            rig.server.tunnel.close("end of the test")

    loop.run(main)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; the rig's own deadline bounds it."""
    while not condition():  # noqa: ASYNC110 - the condition has no event of its own
        await trio.sleep(0.005)


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """A blocking call, while the loop goes on."""
    return await trio.to_thread.run_sync(function, *args)


def read_out(sock: socket.socket) -> tuple[int, str]:
    """How much comes until the end, and its SHA-256."""
    digest, count = hashlib.sha256(), 0
    while chunk := sock.recv(1 << 18):
        digest.update(chunk)
        count += len(chunk)
    return count, digest.hexdigest()
