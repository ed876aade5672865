"""The loop: events, fairness, trio as a guest, and bugs that stay where they are."""

from __future__ import annotations

import os
import socket

import pytest
import trio

from pyambient.engine.deadlines import Deadlines
from pyambient.engine.loop import APP_EVENTS, IN, Loop


def run(main, report=None):
    """Run `main(loop)` under trio on a fresh loop."""
    loop = Loop(report)

    async def bounded():
        with trio.fail_after(10):
            return await main(loop)

    return loop.run(bounded)


def test_the_result_of_the_guest_is_the_result_of_run():
    async def main(loop):
        await trio.lowlevel.checkpoint()
        return 42

    assert run(main) == 42


def test_an_exception_of_the_guest_leaves_run():
    async def main(loop):
        raise KeyError("from the guest")

    with pytest.raises(KeyError, match="from the guest"):
        run(main)


def test_a_handler_may_wake_a_task_and_start_another():
    async def main(loop):
        near, far = socket.socketpair()
        woken, started = trio.Event(), trio.Event()

        async def task():
            started.set()

        async with trio.open_nursery() as nursery:

            def on_readable(mask):
                near.recv(10)
                woken.set()
                nursery.start_soon(task)

            loop.watch(near.fileno(), on_readable, IN)
            far.send(b"x")
            await woken.wait()
            await started.wait()
        loop.unwatch(near.fileno())
        near.close()
        far.close()

    run(main)


def test_a_task_waits_in_a_worker_thread_without_stopping_the_loop():
    async def main(loop):
        near, far = socket.socketpair()
        near.setblocking(False)
        echoed = trio.Event()

        def echo(mask):
            near.send(near.recv(10))
            echoed.set()

        loop.watch(near.fileno(), echo, IN)
        await trio.to_thread.run_sync(lambda: (far.send(b"ping"), far.recv(4)))
        assert echoed.is_set()
        loop.unwatch(near.fileno())
        near.close()
        far.close()

    run(main)


def test_call_soon_of_a_call_waits_for_the_next_turn():
    async def main(loop):
        order = []
        done = trio.Event()

        def again():
            order.append("again")
            done.set()

        def first():
            order.append("first")
            loop.call_soon(again)

        loop.call_soon(first)
        loop.call_soon(lambda: order.append("second"))
        await done.wait()
        assert order == ["first", "second", "again"]

    run(main)


def test_flush_soon_flushes_once_however_often_it_was_asked():
    class Counter:
        flushes = 0

        def flush(self):
            self.flushes += 1

    async def main(loop):
        counter = Counter()
        for _ in range(5):
            loop.flush_soon(counter)
        await trio.sleep(0.01)
        assert counter.flushes == 1

    run(main)


def test_a_reused_descriptor_does_not_see_the_events_of_its_predecessor():
    """A batch of epoll holds events of descriptors that an earlier handler has closed."""

    async def main(loop):
        first, first_peer = socket.socketpair()
        second, second_peer = socket.socketpair()
        seen = []
        fresh, fresh_peer = socket.socketpair()
        done = trio.Event()

        def replaced(mask):
            seen.append(mask)

        def replace(this, other):
            loop.unwatch(this.fileno())
            loop.unwatch(other.fileno())
            os.dup2(fresh.fileno(), other.fileno())
            loop.watch(other.fileno(), replaced, IN)
            done.set()

        loop.watch(first.fileno(), lambda _: replace(first, second), IN)
        loop.watch(second.fileno(), lambda _: replace(second, first), IN)
        first_peer.send(b"x")
        second_peer.send(b"x")
        await done.wait()
        await trio.sleep(0.02)
        assert seen == []
        for sock in (first, first_peer, second, second_peer, fresh, fresh_peer):
            loop.unwatch(sock.fileno())
            sock.close()

    run(main)


def test_a_bug_in_a_handler_is_reported_and_spares_the_others():
    class Buggy:
        crashed_with = None

        def on_events(self, _mask):
            raise ZeroDivisionError("a bug")

        def crashed(self, error):
            self.crashed_with = error
            loops[0].unwatch(bad.fileno())

    loops, reports = [], []
    bad, bad_peer = socket.socketpair()
    good, good_peer = socket.socketpair()

    async def main(loop):
        loops.append(loop)
        buggy, seen = Buggy(), trio.Event()
        loop.watch(bad.fileno(), buggy.on_events, IN)
        bad_peer.send(b"x")
        await trio.sleep(0.02)
        loop.watch(good.fileno(), lambda _: (good.recv(1), seen.set()), IN)
        good_peer.send(b"x")
        await seen.wait()
        assert isinstance(buggy.crashed_with, ZeroDivisionError)
        assert [(type(e), owner) for e, owner in reports] == [(ZeroDivisionError, buggy)]

    run(main, lambda error, owner: reports.append((error, owner)))
    for sock in (bad, bad_peer, good, good_peer):
        sock.close()


def test_app_events_are_edge_triggered():
    async def main(loop):
        near, far = socket.socketpair()
        calls = []
        loop.watch(near.fileno(), calls.append, APP_EVENTS)
        far.send(b"unread")
        await trio.sleep(0.05)
        assert 1 <= len(calls) <= 2
        loop.unwatch(near.fileno())
        near.close()
        far.close()

    run(main)


def test_deadlines_expire_in_order_and_cancelled_ones_do_not():
    async def main(loop):
        deadlines, expired = Deadlines(0.05), []

        def start(name):
            done = trio.Event()
            return done, deadlines.start(lambda: (expired.append(name), done.set()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(deadlines.run)
            start("one")
            start("cancelled")[1].cancel()
            second, _ = start("two")
            assert expired == []
            await second.wait()
            third, _ = start("three")
            await third.wait()
            assert expired == ["one", "two", "three"]
            nursery.cancel_scope.cancel()

    run(main)
