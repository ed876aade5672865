"""Sixty-four connections at once through one tunnel: what arrives is what was sent."""

from __future__ import annotations

import hashlib
import random
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass

import pytest
import trio

from pyambient.engine.farewell import reset_on_close

from .rig import rigged, until

STREAMS = 64


@dataclass(frozen=True)
class Course:
    """What one direction of a connection does; drawn from a seed."""

    seed: int
    size: int
    reset_at: int | None

    @staticmethod
    def draw(seed: int) -> Course:
        dice = random.Random(seed)
        size = dice.choice((0, 1, 100, 20_000, 300_000, 1_000_000))
        return Course(seed, size, size // 2 if dice.random() < 0.15 else None)


def send(sock: socket.socket, course: Course) -> str:
    """Send random bytes in random cuts with pauses, then half-close or reset; their SHA-256."""
    dice, digest, left = random.Random(course.seed), hashlib.sha256(), course.size
    while left:
        if course.reset_at is not None and left <= course.reset_at:
            reset_on_close(sock)
            sock.close()
            return "reset"
        part = dice.randbytes(min(left, dice.choice((1, 17, 4096, 16_384, 100_000))))
        sock.sendall(part)
        digest.update(part)
        left -= len(part)
        if dice.random() < 0.1:
            time.sleep(dice.random() / 50)
    sock.shutdown(socket.SHUT_WR)
    return digest.hexdigest()


def receive(sock: socket.socket, seed: int) -> str:
    """Read to the end in random cuts with pauses; the SHA-256 of all, or "reset"."""
    dice, digest = random.Random(seed), hashlib.sha256()
    try:
        while chunk := sock.recv(dice.choice((1, 100, 4096, 1 << 18))):
            digest.update(chunk)
            if dice.random() < 0.05:
                time.sleep(dice.random() / 50)
    except ConnectionResetError:
        return "reset"
    return digest.hexdigest()


@dataclass
class Connection:
    """The apps of a connection, and what each of its directions has sent and received."""

    ends: tuple[socket.socket, socket.socket]
    courses: tuple[Course, Course]
    sent: dict[int, str]
    received: dict[int, str]

    async def run(self, threads: trio.CapacityLimiter) -> None:
        async with trio.open_nursery() as nursery:
            for index in (0, 1):
                nursery.start_soon(self._send, index, threads)
                nursery.start_soon(self._receive, index, threads)

    async def _send(self, index: int, threads: trio.CapacityLimiter) -> None:
        work = (send, self.ends[index], self.courses[index])
        try:
            self.sent[index] = await trio.to_thread.run_sync(*work, limiter=threads)
        except OSError:
            self.sent[index] = "reset"

    async def _receive(self, index: int, threads: trio.CapacityLimiter) -> None:
        work = (receive, self.ends[1 - index], index)
        try:
            self.received[index] = await trio.to_thread.run_sync(*work, limiter=threads)
        except OSError:
            self.received[index] = "reset"

    def check(self) -> None:
        """Without a reset all arrived; with one nobody took a part for the whole."""
        resets = any(course.reset_at is not None and course.size for course in self.courses)
        for index in (0, 1):
            if not resets:
                assert self.received[index] == self.sent[index], self.courses
            elif self.received[index] != "reset":
                assert self.received[index] == _whole(self.courses[index]), self.courses


def _whole(course: Course) -> str:
    dice, digest, left = random.Random(course.seed), hashlib.sha256(), course.size
    while left:
        part = dice.randbytes(min(left, dice.choice((1, 17, 4096, 16_384, 100_000))))
        digest.update(part)
        left -= len(part)
        if dice.random() < 0.1:
            dice.random()
    return digest.hexdigest()


async def carry(connections: Collection[Connection]) -> None:
    """All at once, each to its end; then they are checked, and their ends closed."""
    threads = trio.CapacityLimiter(4 * len(connections))
    async with trio.open_nursery() as nursery:
        for connection in connections:
            nursery.start_soon(connection.run, threads)
    for connection in connections:
        connection.check()
        for end in connection.ends:
            end.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_sixty_four_streams_arrive_whole(authority, seed):
    """Both ways, with random cuts, pauses, half-closes and resets; the tunnel outlives them."""

    async def test(rig):
        connections = []
        for number in range(STREAMS):
            courses = Course.draw(seed * 1000 + number), Course.draw(seed * 2000 + number)
            connections.append(Connection(rig.open(), courses, {}, {}))
        await carry(connections)
        await until(lambda: all(r.finished for r in (*rig.relays, *rig.server_relays)))
        assert rig.client.tunnel.connection.open_count == 0
        assert not rig.client.tunnel.is_closed

    rigged(authority, test)
