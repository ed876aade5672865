"""Plain relays: bytes, half-close and resets between two sockets."""

from __future__ import annotations

import socket

import pytest
import trio

from pyambient.engine.loop import Loop
from pyambient.engine.plain import PlainRelay
from pyambient.engine.tls import SharedBuffers


def tcp_pair():
    """Two connected TCP sockets; a socketpair knows no RST."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    accepted.setblocking(False)
    return client, accepted


def relayed(use):
    """Run `use(app, server, relay)` in a thread, with a relay between the two sockets."""
    loop = Loop()
    app, near = tcp_pair()
    server, far = tcp_pair()
    app.settimeout(5)
    server.settimeout(5)
    relay = PlainRelay(loop, near, far, SharedBuffers())
    finished = []
    relay.on_finished = finished.append

    async def main():
        relay.start()
        with trio.fail_after(20):
            await trio.to_thread.run_sync(use, app, server)
            while not relay.finished:  # noqa: ASYNC110 - the relay has no event
                await trio.sleep(0.01)

    try:
        loop.run(main)
    finally:
        app.close()
        server.close()
    assert finished == [relay]
    return relay


def read_all(sock):
    chunks = []
    while chunk := sock.recv(1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


def test_bytes_go_both_ways_and_are_counted():
    def use(app, server):
        app.sendall(b"question")
        assert server.recv(100) == b"question"
        server.sendall(b"an answer")
        assert app.recv(100) == b"an answer"
        app.close()
        assert server.recv(1) == b""
        server.close()

    relay = relayed(use)
    assert (relay.bytes_from_near, relay.bytes_from_far) == (8, 9)
    assert relay.error is None


def test_a_half_close_lets_the_other_direction_go_on():
    payload = bytes(range(256)) * 4096

    def use(app, server):
        app.sendall(b"request")
        app.shutdown(socket.SHUT_WR)
        assert read_all(server) == b"request"
        server.sendall(b"late ")
        server.sendall(payload)
        server.close()
        assert read_all(app) == b"late " + payload

    relay = relayed(use)
    assert relay.bytes_from_far == len(payload) + 5


def test_a_slow_reader_gets_every_byte():
    payload = bytes(range(251)) * 80_000

    def use(app, server):
        received = []

        def send():
            app.sendall(payload)
            app.shutdown(socket.SHUT_WR)

        async def both():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, send)
                await trio.sleep(0.2)
                received.append(await trio.to_thread.run_sync(read_all, server))

        trio.run(both)
        assert received == [payload]
        server.close()

    relay = relayed(use)
    assert relay.bytes_from_near == len(payload)


@pytest.mark.parametrize("resetter", ["app", "server"])
def test_a_reset_stays_a_reset(resetter):
    def use(app, server):
        app.sendall(b"x")
        assert server.recv(1) == b"x"
        gone, left = (app, server) if resetter == "app" else (server, app)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.close()
        with pytest.raises(ConnectionResetError):
            left.recv(1)

    relay = relayed(use)
    assert relay.error is not None
