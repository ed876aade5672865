"""Bulk between plain sockets goes by pipes: what is moved, what is kept, and when it is not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import select
import socket
import time
from pathlib import Path

import pytest

from pyambient.engine.farewell import reset_on_close
from pyambient.engine.splicing import PipePool, Splicer
from tests.bed.descriptors import descriptors_left
from tests.bed.patience import patience, wait_for

from .plain_rig import HOSTS, Ledger, read_all, relayed, relaying
from .rig import tcp_pair
from .test_integrity import Connection, Course, carry

MIB = 1 << 20
# Socket buffers of a test's connections: what the kernel keeps of them is known then.
BUFFER = 256 << 10


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture
def pool():
    with contextlib.closing(PipePool()) as made:
        yield made


@pytest.fixture
def splicer(pool, ledger):
    """As the product has it; nothing is left in use."""
    yield Splicer(pool, ledger)
    assert ledger.pipes == 0


@pytest.fixture
def host(family):
    return HOSTS[family]


@pytest.fixture
def ends(host):
    """An app, its socket here, and another app's and its socket: what to splice from and to."""
    (app, near), (server, far) = tcp_pair(host), tcp_pair(host)
    yield app, near, server, far
    for sock in (app, near, server, far):
        sock.close()


def descriptors():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def arrives(sock):
    def peek():
        try:
            sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    wait_for(peek)


# One block


def test_a_block_goes_through_a_pipe_that_is_used_again(splicer, ledger, ends):
    app, near, server, far = ends
    before = None
    for block in (b"one", b"another"):
        app.sendall(block)
        arrives(near)
        pipe = splicer.take_in(near.fileno())
        assert pipe.held == len(block)
        assert ledger.pipes == 1
        assert splicer.pass_on(pipe, far.fileno())
        assert server.recv(100) == block
        before = before or descriptors()
    assert descriptors() == before
    assert (ledger.pipes, ledger.taken) == (0, 2)


def test_a_source_that_has_nothing_gets_no_pipe(splicer, ledger, ends):
    _, near, _, _ = ends
    assert splicer.take_in(near.fileno()) is None
    assert (ledger.taken, ledger.pipes, ledger.missed) == (1, 0, 0)


def test_an_end_is_left_for_recv_to_say(splicer, ends):
    app, near, _, _ = ends
    app.shutdown(socket.SHUT_WR)
    arrives(near)
    assert splicer.take_in(near.fileno()) is None
    assert near.recv(1) == b""


def test_a_reset_is_told_by_whoever_is_asked_first(splicer, ends):
    app, near, _, _ = ends
    reset_on_close(app)
    app.close()
    time.sleep(0.05)
    with pytest.raises(ConnectionResetError):
        splicer.take_in(near.fileno())


def test_what_a_sink_does_not_take_stands_in_the_pipe(splicer, ledger, ends):
    """And a pipe that is given up with something in it never meets another connection."""
    app, near, _, far = ends
    with contextlib.suppress(BlockingIOError):
        while True:
            far.send(bytes(MIB))
    app.sendall(b"secret")
    arrives(near)
    pipe = splicer.take_in(near.fileno())
    with pytest.raises(BlockingIOError):
        splicer.pass_on(pipe, far.fileno())
    assert (pipe.held, ledger.pipes) == (6, 1)
    splicer.drop(pipe)
    app.sendall(b"other")
    arrives(near)
    other = splicer.take_in(near.fileno())
    assert other is not pipe
    assert other.held == 5
    splicer.drop(other)


def test_more_pipes_than_are_kept_are_closed(pool):
    before = descriptors()
    pipes = [pool.take() for _ in range(20)]
    assert descriptors() == before + 40
    for pipe in pipes:
        pool.give(pipe)
    assert before < descriptors() <= before + 16
    pool.close()
    assert descriptors() == before


def test_without_descriptors_there_is_no_pipe(splicer, ledger, ends):
    app, near, _, _ = ends
    app.sendall(b"x")
    arrives(near)
    with descriptors_left(1):
        assert splicer.take_in(near.fileno()) is None
    assert (ledger.pipes, ledger.missed) == (0, 1)
    pipe = splicer.take_in(near.fileno())
    splicer.drop(pipe)


def test_where_a_kernel_does_not_splice_it_is_not_asked_again(splicer, ledger, ends):
    """An eventfd cannot be spliced from: EINVAL, as for a socket of a kind that cannot."""
    app, near, _, _ = ends
    event = os.eventfd(1)
    assert splicer.take_in(event) is None
    os.close(event)
    assert (ledger.taken, ledger.missed) == (1, 1)
    app.sendall(b"x")
    arrives(near)
    assert splicer.take_in(near.fileno()) is None
    assert ledger.taken == 1


# Relays


def test_bulk_is_spliced_and_messages_are_not(splicer, ledger):
    """From about 1 MiB on; a connection that has moved more goes back for small messages."""
    payload = os.urandom(8 * MIB)

    def use(app, server):
        for _ in range(300):
            exchanged(app, server, bytes(5000))
        assert ledger.taken == 0
        assert exchanged(app, server, payload) == payload
        assert ledger.taken > 0
        for number in range(20):
            app.sendall(b"ping")
            assert server.recv(4) == b"ping"
            if number == 0:
                ledger.taken = 0
        assert ledger.taken == 0
        app.close()
        server.close()

    relay = relayed(use, splicer)
    assert relay.bytes_from_near == 1_500_000 + len(payload) + 80


def exchanged(sender, receiver, payload):
    """What arrives of a payload; without a descriptor of its own."""
    left, received = memoryview(payload), bytearray()
    while len(received) < len(payload):
        wanting = [sender] if left else []
        readable, writable, _ = select.select([receiver], wanting, [], patience(5))
        assert readable or writable
        if writable:
            left = left[sender.send(left) :]
        if readable:
            received += receiver.recv(MIB)
    return bytes(received)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_arrives_is_what_was_sent(splicer, ledger, host, seed):
    """Both ways at once, with random cuts, pauses, half-closes and resets, far beyond 1 MiB."""

    async def test(rig):
        connections = []
        for number in range(8):
            dice = random.Random(seed * 100 + number)
            courses = []
            for _ in (0, 1):
                size = dice.choice((0, 100, 3 * MIB, 6 * MIB))
                reset_at = dice.randrange(size) if size and dice.random() < 0.1 else None
                courses.append(Course(dice.randrange(1 << 30), size, reset_at))
            connections.append(Connection(rig.open(host), tuple(courses), {}, {}))
        await carry(connections)
        await rig.wait_finished()

    relaying(test, splicer)
    assert ledger.taken > 0


def small_buffers(*socks):
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)


class Sender:
    """Sends random bytes, and knows how many and what their SHA-256 is."""

    def __init__(self, sock):
        self.sock = sock
        self.sent = 0
        self._dice, self._digest = random.Random(1), hashlib.sha256()

    def until_stuck(self):
        """Until nothing more is taken for a moment."""
        self.sock.settimeout(patience(0.5))
        with contextlib.suppress(TimeoutError):
            while True:
                view = memoryview(self._dice.randbytes(1 << 16))
                while view:
                    count = self.sock.send(view)
                    self._digest.update(view[:count])
                    self.sent += count
                    view = view[count:]
        self.sock.settimeout(patience(5))

    def is_in(self, received):
        return hashlib.sha256(received).digest() == self._digest.digest()


def fill_a_pipe(sender, server, ledger):
    """Send until a pipe is full, not the backlog of a small block; what had to be read for that."""
    received = bytearray()
    for _ in range(20):
        sender.until_stuck()
        if ledger.pipes:
            return received
        received += server.recv(BUFFER)
    raise AssertionError("what was kept never stood in a pipe")


def fed(app, server):
    """So much that what comes next is spliced."""
    exchanged(app, server, bytes(4 * MIB))


def test_a_reader_that_stops_holds_up_its_sender_and_nobody_else(splicer, ledger, host):
    """One pipe's fill is kept; when it reads again all is there, and then the end."""

    async def test(rig):
        app, server = rig.open(host)
        small_buffers(app, server)
        other, its_server = rig.open(host)

        def stuck():
            fed(app, server)
            sender, relay = Sender(app), rig.relays[0]
            received = fill_a_pipe(sender, server, ledger)
            assert (ledger.pipes, ledger.most) == (1, 1)
            read = relay.bytes_from_near
            app.shutdown(socket.SHUT_WR)
            for _ in range(3):
                payload = os.urandom(8 * MIB)
                assert exchanged(other, its_server, payload) == payload
                assert exchanged(its_server, other, payload) == payload
            server.sendall(b"the other way")
            assert app.recv(100) == b"the other way"
            assert relay.bytes_from_near == read < 4 * MIB + sender.sent
            received += read_all(server)
            assert len(received) == sender.sent
            assert sender.is_in(received)
            for sock in (app, server, other, its_server):
                sock.close()

        await rig.use(stuck)
        await rig.wait_finished()
        assert all(relay.error is None for relay in rig.relays)

    relaying(test, splicer)


@pytest.mark.parametrize("who", ["sink", "source"])
def test_a_reset_beyond_a_full_pipe_is_one(splicer, ledger, host, who):
    """Of the sink at once, of the source when what it had sent is through."""
    before = descriptors()

    def use(app, server):
        small_buffers(app, server)
        fed(app, server)
        fill_a_pipe(Sender(app), server, ledger)
        gone, left = (server, app) if who == "sink" else (app, server)
        reset_on_close(gone)
        gone.close()
        with pytest.raises(ConnectionResetError):
            read_all(left)

    relay = relayed(use, splicer, host)
    assert relay.error is not None
    assert ledger.pipes == 0
    assert descriptors() <= before + 16


def test_a_relay_that_is_ended_gives_its_pipe_back(splicer, ledger, host):
    """By a drain, or by a policy that changed."""

    async def test(rig):
        app, server = rig.open(host)

        def stuck():
            small_buffers(app, server)
            fed(app, server)
            fill_a_pipe(Sender(app), server, ledger)

        await rig.use(stuck)
        assert ledger.pipes == 1
        rig.relays[0].abort("connection closed due to connection drain")
        assert ledger.pipes == 0
        await rig.wait_finished()

    relaying(test, splicer)


@pytest.mark.parametrize("lack", ["budget", "descriptors", "kernel"])
def test_where_there_is_no_pipe_bytes_go_all_the_same(splicer, pool, ledger, lack):
    """A pod without budget, a process without descriptors, a kernel that does not."""
    payload = os.urandom(8 * MIB)

    def use(app, server):
        if lack == "budget":
            ledger.allowed = 0
        elif lack == "kernel":
            event = os.eventfd(1)
            assert splicer.take_in(event) is None
            os.close(event)
        with descriptors_left(1) if lack == "descriptors" else contextlib.nullcontext():
            app.sendall(payload[:1])
            assert server.recv(1) == payload[:1]
            received = exchanged(app, server, payload)
        assert received == payload
        app.close()
        server.close()

    relay = relayed(use, splicer)
    assert relay.bytes_from_near == len(payload) + 1
    assert ledger.missed > 0
    assert ledger.most <= 1
