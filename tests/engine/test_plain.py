"""Plain relays: bytes, half-close and resets between two sockets."""

from __future__ import annotations

import socket

import pytest
import trio

from pyambient.engine.splicing import Bulk, PipePool, Splicer

from .plain_rig import Ledger, read_all, read_exactly, relayed, relaying
from .rig import in_thread


@pytest.fixture(params=["received", "spliced"])
def splicer(request):
    """Each block is received and sent, or all but the first are spliced."""
    if request.param == "received":
        yield None
        return
    ledger, pool = Ledger(), PipePool()
    yield Splicer(pool, ledger, Bulk(0, 0))
    pool.close()
    assert (ledger.taken > 0, ledger.pipes) == (True, 0)


def test_bytes_go_both_ways_and_are_counted(splicer):
    def use(app, server):
        app.sendall(b"question")
        assert server.recv(100) == b"question"
        server.sendall(b"an answer")
        assert app.recv(100) == b"an answer"
        app.close()
        assert server.recv(1) == b""
        server.close()

    relay = relayed(use, splicer)
    assert (relay.bytes_from_near, relay.bytes_from_far) == (8, 9)
    assert relay.error is None


def test_a_half_close_lets_the_other_direction_go_on(splicer):
    payload = bytes(range(256)) * 4096

    def use(app, server):
        app.sendall(b"request")
        app.shutdown(socket.SHUT_WR)
        assert read_all(server) == b"request"
        server.sendall(b"late ")
        server.sendall(payload)
        server.close()
        assert read_all(app) == b"late " + payload

    relay = relayed(use, splicer)
    assert relay.bytes_from_far == len(payload) + 5


def test_a_slow_reader_gets_every_byte(splicer):
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

    relay = relayed(use, splicer)
    assert relay.bytes_from_near == len(payload)


@pytest.mark.parametrize("resetter", ["app", "server"])
def test_a_reset_stays_a_reset(splicer, resetter):
    def use(app, server):
        for one, other in ((app, server), (server, app)):
            one.sendall(b"x")
            assert other.recv(1) == b"x"
        gone, left = (app, server) if resetter == "app" else (server, app)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.close()
        with pytest.raises(ConnectionResetError):
            left.recv(1)

    relay = relayed(use, splicer)
    assert relay.error is not None


def test_bytes_behind_urgent_data_arrive_at_once(splicer):
    """recv(2) and splice(2) stop there, and no event comes for what is there already."""
    part = bytes(range(200)) * 100

    async def test(rig):
        app, server = rig.open()
        app.sendall(b"x")
        await in_thread(read_exactly, server, 1)
        for data, flags in ((part, 0), (b"!", socket.MSG_OOB), (part, 0)):
            app.sendall(data, flags)
        assert await in_thread(read_exactly, server, 2 * len(part)) == 2 * part
        for sock in (app, server):
            sock.close()
        await rig.wait_finished()
        assert rig.relays[0].error is None

    relaying(test, splicer)
