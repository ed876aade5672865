"""What is kept for apps and peers that do not read: bounded, and somebody answers for it."""

from __future__ import annotations

import contextlib
import socket

import pytest
import trio

from pyambient.engine.loop import IN
from pyambient.engine.reservoir import Reservoir

from .rig import in_thread, read_out, rigged, until


def test_an_app_that_does_not_read_costs_its_own_connection_when_its_pod_keeps_too_much(authority):
    """Over the budget the stream is reset with an error; the tunnel's other streams go on."""

    async def test(rig):
        deaf, sender = rig.open()
        lively, lively_server = rig.open()
        reservoir = Reservoir(100_000)
        for relay in rig.relays:
            relay.reservoir = reservoir

        def flood():
            while True:
                sender.sendall(bytes(1 << 16))

        with pytest.raises(OSError, match=r"reset|Broken"):
            await in_thread(flood)
        assert "kept" in rig.relays[0].error
        assert reservoir.held == 0
        await in_thread(lively.sendall, b"ping")
        assert await in_thread(lively_server.recv, 4) == b"ping"
        for sock in (deaf, sender, lively, lively_server):
            sock.close()

    rigged(authority, test)


class Kept:
    """What one tunnel keeps for its peer, of how much (an `Unread`)."""

    def __init__(self, most):
        self.most = most
        self.held = self.peak = 0
        self.scarce = False

    def keep(self, count):
        if count > self.most:
            return False
        self.held = count
        self.peak = max(self.peak, count)
        return True


async def stuck(rig, unread):
    """An upload whose server's proxy reads nothing: the app's socket, the server's."""
    tunnel = rig.client.tunnel
    tunnel.unread = unread
    app, server = rig.open()
    await until(lambda: rig.server_relays)
    rig.loop.unwatch(rig.server.tunnel._fd)
    rig.server.tunnel._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    tunnel._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    app.setblocking(False)
    while not tunnel.blocked and not tunnel.is_closed:
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            app.send(bytes(1 << 16))
        await trio.sleep(0.001)
    return app, server


def test_what_a_tunnel_keeps_for_its_peer_is_accounted_for(authority):
    """While the peer reads nothing; nothing is left of that when it has read."""

    async def test(rig):
        unread = Kept(1 << 20)
        app, server = await stuck(rig, unread)
        assert 0 < unread.held < 1 << 20
        rig.loop.watch(rig.server.tunnel._fd, rig.server.tunnel.on_events, IN)
        app.setblocking(True)
        app.shutdown(socket.SHUT_WR)
        received, _ = await in_thread(read_out, server)
        assert received == rig.relays[0].bytes_up
        await until(lambda: not unread.held)
        app.close()
        server.close()

    rigged(authority, test)


def test_a_tunnel_that_keeps_too_much_is_ended(authority):
    """Its apps see a reset, and it answers for nothing any more."""

    async def test(rig):
        unread = Kept(10_000)
        app, server = await stuck(rig, unread)
        tunnel = rig.client.tunnel
        await until(lambda: tunnel.is_closed)
        assert "does not read" in tunnel.reason
        assert (unread.held, unread.peak) == (0, 0)
        app.setblocking(True)
        with pytest.raises(ConnectionResetError):
            await in_thread(app.recv, 1)
        app.close()
        server.close()

    rigged(authority, test)


@pytest.mark.parametrize("scarce", [False, True])
def test_where_room_is_scarce_blocks_are_small(authority, scarce):
    """So many more tunnels can be stuck before one has to be ended."""

    async def test(rig):
        unread = Kept(1 << 20)
        unread.scarce = scarce
        app, server = await stuck(rig, unread)
        assert (unread.peak < 40_000) is scarce
        app.close()
        server.close()

    rigged(authority, test)
