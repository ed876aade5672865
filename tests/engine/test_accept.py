"""Accepting and connecting on the loop."""

from __future__ import annotations

import errno
import socket

import pytest
import trio

from pyambient.engine.accept import Listener, connect
from pyambient.engine.deadlines import Deadlines
from pyambient.engine.loop import Loop
from pyambient.model.address import SocketAddress

from .rig import until


class ShortOfDescriptors:
    """A listening socket whose accept(2) fails for want of descriptors until told otherwise."""

    def __init__(self, sock):
        self.sock = sock
        self.short = True
        self.asked = 0

    def accept(self):
        self.asked += 1
        if self.short:
            raise OSError(errno.EMFILE, "Too many open files")
        return self.sock.accept()

    def __getattr__(self, name):
        return getattr(self.sock, name)


def hosted(test, pause=0.05):
    """Run `test(loop, pause)` with deadlines of `pause` seconds running."""
    loop = Loop()

    async def main():
        deadlines = Deadlines(pause)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deadlines.run)
            with trio.fail_after(10):
                await test(loop, deadlines)
            nursery.cancel_scope.cancel()

    loop.run(main)


def test_a_listener_without_descriptors_pauses_and_does_not_spin():
    """The connection waits in the backlog; it is asked for once a pause, and served in the end."""
    turns = 0

    async def test(loop, pause):
        nonlocal turns
        with socket.create_server(("127.0.0.1", 0)) as server:
            short = ShortOfDescriptors(server)
            accepted = []
            listener = Listener(loop, short, lambda sock, _: accepted.append(sock), pause)
            listener.start()
            with socket.create_connection(server.getsockname()) as client:
                await until(lambda: listener.shortages >= 3)
                turns = short.asked
                assert "paused" in repr(listener)
                short.short = False
                await until(lambda: accepted)
                assert accepted[0].getpeername() == client.getsockname()
            for sock in accepted:
                sock.close()
            listener.close()

    hosted(test)
    assert turns == 3


def test_connections_that_come_at_once_are_all_accepted():
    """More than a turn takes are taken in the turns that follow."""

    async def test(loop, pause):
        with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
            clients = [socket.create_connection(server.getsockname()) for _ in range(40)]
            accepted = []
            listener = Listener(loop, server, lambda sock, _: accepted.append(sock), pause)
            listener.start()
            await until(lambda: len(accepted) == 40)
            for sock in (*clients, *accepted):
                sock.close()
            listener.close()

    hosted(test)


@pytest.fixture
def sock():
    with socket.socket() as made:
        made.setblocking(False)
        yield made


def test_a_connect_over_lo_is_done_at_once(sock):
    """The second connect(2) says what the first one could not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert connect(sock, SocketAddress(*server.getsockname()))
        assert sock.getpeername() == server.getsockname()


def test_a_refused_connect_over_lo_is_an_error_at_once(sock):
    """The reason is the kernel's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = SocketAddress(*server.getsockname())
    with pytest.raises(ConnectionRefusedError):
        connect(sock, nobody)
