"""Where log lines go: a file descriptor that may be slower than the lines come.

General theory of operation
---------------------------
Without `run()` a line is written at once, and a slow reader holds up the writer: right for a
command, or while a program starts and stops. Under `run()` lines are queued, and a trio task hands
them to a worker thread in batches, every 50 ms while there are any: the data path never waits for
a terminal that is stopped or a pipe whose reader is busy.

The queue is bounded. ztunnel lets a full one hold up its connections; here they share one thread
with everything else, so lines are dropped instead, counted, and a warning in the log says how many
are missing as soon as the sink takes lines again. A sink that fails (its reader is gone) drops
lines too: traffic does not depend on the log.

Several processes may write to one sink, the agent's and the workers'. A pipe keeps apart what is
written in pieces of at most PIPE_BUF bytes (pipe(7)), so pieces are whole lines of no more than
that together. A line that is longer is a piece by itself, which another's may get into.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterable, Iterator

import trio

from .layout import layout_of

MAX_LINES = 10_000
MAX_CHARACTERS = 8 << 20
FLUSH_INTERVAL = 0.05
# How long the last lines may take when the program ends.
LAST_FLUSH = 1.0


class LineSink:
    """Writes lines to `fd`, which stays the caller's to close; lines may come from any thread."""

    def __init__(self, fd: int, log_format: str = "plain") -> None:
        self._fd = fd
        self._layout = layout_of(log_format)
        self._token: trio.lowlevel.TrioToken | None = None
        self._wake = trio.Event()
        self._queueing = threading.Lock()
        self._lines: list[str] = []
        self._characters = 0
        self._overflowed = 0
        # A write that was given up may still hold the fd when the last flush comes.
        self._writing = threading.Lock()
        self._unwritten = 0
        self._reported = 0

    @property
    def dropped(self) -> int:
        """How many lines were lost since the start."""
        return self._overflowed + self._unwritten

    def put(self, line: str) -> None:
        """Take one line without its newline; never blocks under `run()`."""
        token = self._token
        if token is None:
            self._write([line])
        elif self._queue(line):
            # The caller may be a thread, or a callback of the engine's loop, outside of trio.
            token.run_sync_soon(self._wake_up)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what is put, until cancelled; then the rest, as far as the sink takes it."""
        self._token = trio.lowlevel.current_trio_token()
        task_status.started()
        try:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                await trio.sleep(FLUSH_INTERVAL)
                await self._flush()
        finally:
            self._token = None
            with trio.move_on_after(LAST_FLUSH, shield=True):
                await self._flush()

    def _queue(self, line: str) -> bool:
        """Queue or drop a line; whether it is the first of a batch."""
        with self._queueing:
            if len(self._lines) >= MAX_LINES or self._characters >= MAX_CHARACTERS:
                self._overflowed += 1
                return False
            self._lines.append(line)
            self._characters += len(line)
            return len(self._lines) == 1

    def _wake_up(self) -> None:
        self._wake.set()

    async def _flush(self) -> None:
        with self._queueing:
            lines, self._lines, self._characters = self._lines, [], 0
        await trio.to_thread.run_sync(self._write, lines, abandon_on_cancel=True)

    def _write(self, lines: list[str]) -> None:
        with self._writing:
            missing = self.dropped - self._reported
            notice = [self._notice(missing)] if missing else []
            encoded = (f"{line}\n".encode(errors="backslashreplace") for line in (*lines, *notice))
            try:
                for piece in _pieces(encoded):
                    self._write_all(piece)
            except OSError:
                self._unwritten += len(lines)
            else:
                self._reported += missing

    def _write_all(self, text: bytearray) -> None:
        view = memoryview(text)
        while view:
            view = view[os.write(self._fd, view) :]

    def _notice(self, missing: int) -> str:
        message = "log lines were dropped, the reader of the log is too slow"
        return self._layout("warn", "observe", message, {"lines": missing})

    def __repr__(self) -> str:
        return f"<LineSink fd {self._fd}, {len(self._lines)} queued, {self.dropped} dropped>"


def _pieces(lines: Iterable[bytes]) -> Iterator[bytearray]:
    """The lines, as many together as a pipe takes at once."""
    piece = bytearray()
    for line in lines:
        if piece and len(piece) + len(line) > select.PIPE_BUF:
            yield piece
            piece = bytearray()
        piece += line
    yield piece
