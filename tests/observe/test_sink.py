"""Lines on their way out: in order, never in the way, and counted when they are lost."""

from __future__ import annotations

import json
import os
import queue
import select
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio

from pyambient.observe import sink as sink_module
from pyambient.observe.sink import LineSink


class Pipe:
    """A pipe whose ends are closed once, by the test or after it."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        self._open = {self.reading, self.writing}

    def close(self, end: int) -> None:
        if end in self._open:
            self._open.remove(end)
            os.close(end)

    @property
    def full(self) -> bool:
        return not select.select([], [self.writing], [], 0)[1]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """Where a sink writes to."""
    made = Pipe()
    yield made
    made.close(made.reading)
    made.close(made.writing)


def play(sink: LineSink, scenario: Callable[[], Awaitable[None]]) -> None:
    """Run `scenario` beside the sink's task, then stop that."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(sink.run)
            await scenario()
            nursery.cancel_scope.cancel()

    trio.run(main)


async def read_until(fd: int, mark: bytes) -> bytes:
    """Everything in the pipe up to `mark` and what came with it."""
    taken = b""
    async with trio.lowlevel.FdStream(os.dup(fd)) as stream:
        while mark not in taken:
            taken += await stream.receive_some(1 << 20)
    return taken


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; the sink's thread has a mind of its own."""
    for _ in range(2000):
        if condition():
            return
        await trio.sleep(0.005)
    raise AssertionError("it never happened")


def test_without_run_lines_are_written_at_once(pipe: Pipe) -> None:
    """A program that starts, or a command, needs no task for its log."""
    sink = LineSink(pipe.writing)
    sink.put("one")
    assert os.read(pipe.reading, 100) == b"one\n"


def test_under_run_lines_come_in_order(pipe: Pipe) -> None:
    """Batches keep the order, and nothing is lost."""
    sink = LineSink(pipe.writing)
    expected = "".join(f"line {number}\n" for number in range(3000)).encode()
    taken = []

    async def scenario() -> None:
        for number in range(3000):
            sink.put(f"line {number}")
            if number % 1000 == 0:
                await trio.sleep(0.06)
        taken.append(await read_until(pipe.reading, b"line 2999\n"))

    play(sink, scenario)
    assert taken == [expected]
    assert sink.dropped == 0


def test_the_rest_is_written_when_it_stops(pipe: Pipe) -> None:
    """The last lines of a program are not lost, nor those after its loop."""
    sink = LineSink(pipe.writing)

    async def scenario() -> None:
        sink.put("last")

    play(sink, scenario)
    sink.put("afterwards")
    assert os.read(pipe.reading, 100) == b"last\nafterwards\n"


def test_slow_reader(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it; what does not fit is counted, and the log says so when it goes on."""
    monkeypatch.setattr(sink_module, "MAX_LINES", 100)
    sink = LineSink(pipe.writing)
    taken = []

    async def scenario() -> None:
        for _ in range(100):
            sink.put("x" * 4000)
        await eventually(lambda: pipe.full)
        for number in range(250):
            sink.put(f"line {number}")
        assert sink.dropped == 150
        assert repr(sink) == f"<LineSink fd {pipe.writing}, 100 queued, 150 dropped>"
        taken.append(await read_until(pipe.reading, b"dropped"))
        sink.put("again")
        taken.append(await read_until(pipe.reading, b"again\n"))

    play(sink, scenario)
    lines = taken[0].decode().splitlines()[100:]
    assert lines[:100] == [f"line {number}" for number in range(100)]
    assert lines[100].endswith(
        "\twarn\tobserve\tlog lines were dropped, the reader of the log is too slow\tlines=150"
    )
    assert taken[1] == b"again\n"


def test_long_lines_fill_the_queue_too(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is bounded in characters as well as in lines."""
    monkeypatch.setattr(sink_module, "MAX_CHARACTERS", 1000)
    sink = LineSink(pipe.writing)

    async def scenario() -> None:
        for _ in range(10):
            sink.put("x" * 300)
        assert sink.dropped == 6

    play(sink, scenario)


def test_stuck_reader_does_not_hold_up_the_end(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose log nobody reads still stops."""
    monkeypatch.setattr(sink_module, "LAST_FLUSH", 0.05)
    sink = LineSink(pipe.writing)

    async def scenario() -> None:
        for _ in range(100):
            sink.put("x" * 4000)
        await eventually(lambda: pipe.full)
        sink.put("never read")

    play(sink, scenario)
    pipe.close(pipe.reading)
    trio.run(eventually, lambda: sink.dropped == 101)


def test_the_last_lines_wait_for_a_write_under_way(pipe: Pipe) -> None:
    """A reader that wakes up at the end finds every line whole and in its place."""
    sink = LineSink(pipe.writing)
    lines = [f"{number} " + "x" * 4000 for number in range(100)]
    expected = "".join(f"{line}\n" for line in [*lines, "last"]).encode()
    ending = threading.Event()

    def read() -> bytes:
        ending.wait()
        time.sleep(0.05)
        taken = b""
        while len(taken) < len(expected):
            taken += os.read(pipe.reading, 1000)
        return taken

    async def scenario() -> None:
        for line in lines:
            sink.put(line)
        await eventually(lambda: pipe.full)
        sink.put("last")
        ending.set()

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        play(sink, scenario)
        assert reading.result() == expected


def test_reader_that_is_gone(pipe: Pipe) -> None:
    """A closed pipe costs the lines, not the program."""
    pipe.close(pipe.reading)
    sink = LineSink(pipe.writing)
    sink.put("one")

    async def scenario() -> None:
        sink.put("two")

    play(sink, scenario)
    assert sink.dropped == 2


def test_lines_from_outside_of_trio(pipe: Pipe) -> None:
    """The engine's loop, which hosts trio as a guest, logs from its own callbacks."""
    sink = LineSink(pipe.writing)
    host: queue.Queue[Callable[[], object] | None] = queue.Queue()
    taken = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(sink.run)
            host.put(lambda: sink.put("from the host"))
            taken.append(await read_until(pipe.reading, b"\n"))
            nursery.cancel_scope.cancel()

    trio.lowlevel.start_guest_run(
        main, run_sync_soon_threadsafe=host.put, done_callback=lambda _outcome: host.put(None)
    )
    while (callback := host.get()) is not None:
        callback()
    assert taken == [b"from the host\n"]


def test_lines_from_a_thread(pipe: Pipe) -> None:
    """Work that was sent to a thread logs like everyone else."""
    sink = LineSink(pipe.writing)
    taken = []

    async def scenario() -> None:
        await trio.to_thread.run_sync(sink.put, "from a thread")
        taken.append(await read_until(pipe.reading, b"\n"))

    play(sink, scenario)
    assert taken == [b"from a thread\n"]


def test_text_that_is_no_unicode(tmp_path: Path) -> None:
    """A surrogate from a file name does not break the sink."""
    with (tmp_path / "log").open("wb") as file:
        LineSink(file.fileno()).put("a\udc80b")
    assert (tmp_path / "log").read_bytes() == b"a\\udc80b\n"


def test_notice_in_json(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is parsed stays parsable where lines are missing."""
    monkeypatch.setattr(sink_module, "MAX_LINES", 1)
    sink = LineSink(pipe.writing, "json")

    async def scenario() -> None:
        for _ in range(3):
            sink.put("{}")

    play(sink, scenario)
    _, notice = os.read(pipe.reading, 1000).decode().splitlines()
    assert json.loads(notice)["lines"] == 2


def test_lines_of_several_processes_stay_whole(pipe: Pipe) -> None:
    """Each writes batches that are larger than the pipe, and the reader is slower than they are."""
    names, count = ("a", "b", "c"), 2000
    pids = []
    for name in names:
        if (pid := os.fork()) == 0:
            code = 1
            try:
                batch = [name * (200 + number % 700) for number in range(count)]
                LineSink(pipe.writing)._write(batch)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    pipe.close(pipe.writing)
    with os.fdopen(os.dup(pipe.reading), "rb") as reader:
        lines = reader.read().splitlines()
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert len(lines) == len(names) * count
    assert [line for line in lines if len(set(line)) != 1] == []
