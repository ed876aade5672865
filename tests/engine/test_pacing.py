"""Heavy steps take turns with the rest of the loop."""

from __future__ import annotations

import trio

from pyambient.engine.loop import Loop
from pyambient.engine.pacing import Pacer, Queue

from .rig import until


def test_a_turn_of_the_loop_has_one_paced_step():
    """However many tasks want one, between two steps the loop makes a turn."""
    loop = Loop()
    turns = 0
    seen: list[int] = []

    def tick() -> None:
        nonlocal turns
        turns += 1
        if len(seen) < 5:
            loop.call_soon(tick)

    async def main() -> None:
        pacer = Pacer(loop)

        async def step() -> None:
            async with pacer:
                seen.append(turns)

        loop.call_soon(tick)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(step)

    loop.run(main)
    assert len(set(seen)) == 5


def test_a_task_that_gives_up_waiting_does_not_hold_the_others():
    """A cancelled waiter leaves the line, before its turn and on it."""
    loop = Loop()

    async def main() -> str:
        pacer = Pacer(loop)
        async with trio.open_nursery() as nursery:
            async with pacer:
                with trio.move_on_after(0.01):
                    async with pacer:
                        return "entered a busy pacer"
            with trio.CancelScope() as scope:
                scope.cancel()
                async with pacer:
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.deadline = trio.current_time() + 5
            async with pacer:
                return "entered"

    assert loop.run(main) == "entered"


def test_a_queue_spreads_its_calls_over_turns():
    """At most so many calls a turn, in their order, and all of them."""
    loop = Loop()
    turns = 0
    seen: list[tuple[int, int]] = []

    def tick() -> None:
        nonlocal turns
        turns += 1
        if len(seen) < 20:
            loop.call_soon(tick)

    async def main() -> None:
        queue = Queue(loop, 3)
        loop.call_soon(tick)
        for number in range(20):
            queue.call(lambda number=number: seen.append((turns, number)))
        await until(lambda: len(seen) == 20)

    loop.run(main)
    assert [number for _, number in seen] == list(range(20))
    a_turn = [turn for turn, _ in seen]
    assert max(map(a_turn.count, a_turn)) <= 3
