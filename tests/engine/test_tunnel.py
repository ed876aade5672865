"""Tunnels and relays with real TLS over real sockets: bytes, ends, backpressure, loss."""

from __future__ import annotations

import gc
import hashlib
import os
import socket

import pytest
import trio

from pyambient.engine.farewell import reset_on_close
from pyambient.engine.relay import StreamRelay
from pyambient.hbone import Stream

from .plain_rig import read_exactly
from .rig import in_thread, read_out, rigged, until


def test_bytes_go_both_ways(authority):
    async def test(rig):
        app, server = rig.open()
        await in_thread(app.sendall, b"question")
        assert await in_thread(server.recv, 100) == b"question"
        await in_thread(server.sendall, b"answer")
        assert await in_thread(app.recv, 100) == b"answer"
        app.close()
        assert await in_thread(server.recv, 1) == b""
        server.close()
        await until(lambda: rig.relays[0].finished and rig.server_relays[0].finished)
        assert (rig.relays[0].bytes_up, rig.relays[0].bytes_down) == (8, 6)
        assert (rig.server_relays[0].bytes_up, rig.server_relays[0].bytes_down) == (6, 8)
        assert rig.relays[0].error is None
        assert rig.server_relays[0].error is None

    rigged(authority, test)


def test_bulk_is_not_altered_in_either_direction(authority):
    payload = os.urandom(20 << 20)
    expected = (len(payload), hashlib.sha256(payload).hexdigest())

    async def test(rig):
        async def transfer(sender, receiver):
            def send():
                sender.sendall(payload)
                sender.shutdown(socket.SHUT_WR)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(in_thread, send)
                assert await in_thread(read_out, receiver) == expected

        pairs = [rig.open() for _ in range(3)]
        async with trio.open_nursery() as nursery:
            for app, server in pairs:
                nursery.start_soon(transfer, app, server)
                nursery.start_soon(transfer, server, app)
        await until(lambda: all(r.finished for r in (*rig.relays, *rig.server_relays)))
        for sock in (s for pair in pairs for s in pair):
            sock.close()

    rigged(authority, test)


@pytest.mark.parametrize("first", ["app", "server"])
def test_a_half_close_lets_the_other_direction_go_on(authority, first):
    async def test(rig):
        app, server = rig.open()
        early, late = (app, server) if first == "app" else (server, app)
        early.sendall(b"that was all")
        early.shutdown(socket.SHUT_WR)
        assert (await in_thread(read_out, late))[0] == 12
        late.sendall(b"x" * 100_000)
        late.close()
        assert (await in_thread(read_out, early))[0] == 100_000
        early.close()
        await until(lambda: rig.relays[0].finished)
        assert rig.relays[0].error is None

    rigged(authority, test)


@pytest.mark.parametrize("resetter", ["app", "server"])
def test_a_reset_stays_a_reset_through_the_tunnel(authority, resetter):
    async def test(rig):
        app, server = rig.open()
        app.sendall(b"x")
        assert await in_thread(server.recv, 1) == b"x"
        gone, left = (app, server) if resetter == "app" else (server, app)
        reset_on_close(gone)
        gone.close()
        with pytest.raises(ConnectionResetError):
            await in_thread(left.recv, 1)
        left.close()
        assert rig.relays[0].error
        assert rig.server_relays[0].error

    rigged(authority, test)


def test_a_refusal_reaches_the_app_as_a_reset(authority):
    async def test(rig):
        rig.accept = False
        app, server = rig.open()
        with pytest.raises(ConnectionResetError):
            await in_thread(app.recv, 1)
        app.close()
        server.close()
        assert rig.relays[0].error == "http status: 503"

    rigged(authority, test)


def test_bytes_behind_urgent_data_arrive_at_once(authority):
    """recv(2) stops there, and no event comes for what is there already."""
    part = bytes(range(200)) * 10

    async def test(rig):
        app, server = rig.open()
        for data, flags in ((part, 0), (b"!", socket.MSG_OOB), (part, 0)):
            app.sendall(data, flags)
        assert await in_thread(read_exactly, server, 2 * len(part)) == 2 * part
        app.close()
        server.close()
        await until(lambda: rig.relays[0].finished and rig.server_relays[0].finished)

    rigged(authority, test)


def test_an_app_that_does_not_read_holds_up_no_other(authority):
    async def test(rig):
        stuck, stuck_server = rig.open()
        lively, lively_server = rig.open()
        stuck_server.setblocking(False)
        sent = 0
        with trio.move_on_after(1):
            while True:
                try:
                    sent += stuck_server.send(bytes(1 << 16))
                except BlockingIOError:
                    await trio.sleep(0.01)
        assert sent < 32 << 20
        for _ in range(100):
            lively.sendall(b"ping")
            assert await in_thread(lively_server.recv, 4) == b"ping"
        backlog = rig.relays[0]._backlog
        assert backlog is None or len(backlog) <= 4 << 20
        for sock in (stuck, stuck_server, lively, lively_server):
            sock.close()

    rigged(authority, test)


def test_data_dropped_by_a_dead_app_is_credited_back(authority):
    """Eight aborted downloads once left no connection window: the tunnel was dead."""

    async def test(rig):
        for _ in range(8):
            app, server = rig.open()
            server.setblocking(False)
            with trio.move_on_after(0.15):
                while True:
                    try:
                        server.send(bytes(1 << 16))
                    except BlockingIOError:
                        await trio.sleep(0.005)
            reset_on_close(app)
            app.close()
            server.close()
        app, server = rig.open()
        server.sendall(b"still alive")
        assert await in_thread(app.recv, 100) == b"still alive"
        app.close()
        server.close()

    rigged(authority, test)


def test_a_lost_tunnel_resets_every_connection_in_it(authority):
    async def test(rig):
        pairs = [rig.open() for _ in range(3)]
        for app, server in pairs:
            app.sendall(b"x")
            assert await in_thread(server.recv, 1) == b"x"
        rig.server.tunnel.close("pulled the plug")
        for app, server in pairs:
            with pytest.raises(ConnectionResetError):
                await in_thread(app.recv, 1)
            app.close()
            server.close()
        await rig.client.tunnel.closed.wait()
        assert {relay.error for relay in rig.relays} == {rig.client.tunnel.reason}

    rigged(authority, test)


def test_draining_lets_open_connections_end_and_opens_no_more(authority):
    async def test(rig):
        app, server = rig.open()
        app.sendall(b"x")
        assert await in_thread(server.recv, 1) == b"x"
        rig.server.tunnel.drain()
        await until(lambda: not rig.client.tunnel.connection.can_open())
        server.sendall(b"going on")
        assert await in_thread(app.recv, 100) == b"going on"
        app.close()
        server.close()
        await rig.server.tunnel.closed.wait()
        assert "goaway 0" in rig.client.told

    rigged(authority, test)


def test_a_drained_tunnel_delivers_its_last_bytes_through_a_blocked_socket(authority):
    """`drained` comes when the output was taken, which may be by a BIO and not by the socket."""
    payload = bytes(300 << 10)

    async def test(rig):
        app, server = rig.open()
        app.sendall(b"x")
        assert await in_thread(server.recv, 1) == b"x"
        app.close()
        rig.client.tunnel._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        app, server2 = rig.open()
        server2.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        rig.client.tunnel.drain()

        def send():
            app.sendall(payload)
            app.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, send)
            server2.shutdown(socket.SHUT_WR)
            assert (await in_thread(read_out, server2))[0] == len(payload)
        server.close()
        server2.close()
        await rig.client.tunnel.closed.wait()
        assert rig.relays[1].error is None

    rigged(authority, test)


@pytest.mark.interpreted
def test_keep_alive_closes_a_tunnel_whose_peer_is_silent(authority, monkeypatch):
    monkeypatch.setattr("pyambient.engine.tunnel.PING_INTERVAL", 0.05)
    monkeypatch.setattr("pyambient.engine.tunnel.PING_TIMEOUT", 0.1)

    async def test(rig):
        await trio.sleep(0.3)
        assert not rig.client.tunnel.is_closed
        rig.loop.unwatch(rig.server.tunnel._fd)
        await rig.client.tunnel.closed.wait()
        assert "ping timeout" in rig.client.tunnel.reason

    rigged(authority, test)


@pytest.mark.interpreted
def test_a_tunnel_that_goes_idle_gives_back_what_it_grew_to(authority, monkeypatch):
    """Bulk is over for a PING interval: the buffers of both ends are replaced, PINGs go on."""
    monkeypatch.setattr("pyambient.engine.tunnel.PING_INTERVAL", 0.05)
    payload = bytes(1 << 20)

    async def test(rig):
        tunnels = (rig.client.tunnel, rig.server.tunnel)
        before = [tunnel._transport._calls._in for tunnel in tunnels]
        app, server = rig.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, app.sendall, payload)
            got = 0
            while got < len(payload):
                got += len(await in_thread(server.recv, 1 << 18))
            await until(
                lambda: all(
                    tunnel._transport._calls._in != old
                    for tunnel, old in zip(tunnels, before, strict=True)
                )
            )
            await in_thread(server.sendall, b"still alive")
            assert await in_thread(app.recv, 100) == b"still alive"
        app.close()
        server.close()

    rigged(authority, test)


def test_a_peer_that_breaks_http2_ends_the_tunnel_with_a_reason(authority):
    async def test(rig):
        tunnel = rig.client.tunnel
        tunnel._transport.send(memoryview(b"\0\0\4\x08\0\0\0\0\0\0\0\0\0"))
        await rig.server.tunnel.closed.wait()
        assert "HTTP/2 error of the peer" in rig.server.tunnel.reason

    rigged(authority, test)


def test_a_finished_connection_leaves_nothing_to_the_collector(authority):
    """No reference cycle: a collection for every few hundred connections costs more than they."""

    async def test(rig):
        app, server = rig.open()
        await in_thread(app.sendall, b"question")
        assert await in_thread(server.recv, 100) == b"question"
        app.close()
        server.close()
        await until(lambda: rig.relays[0].finished and rig.server_relays[0].finished)
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        rig.relays.clear()
        rig.server_relays.clear()
        gc.collect()
        left = [found for found in gc.garbage if isinstance(found, (StreamRelay, Stream))]
        assert left == []

    gc.disable()
    try:
        rigged(authority, test)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
