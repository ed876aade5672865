"""Outgoing bytes of a connection, in the order they were made.

General theory of operation
---------------------------
Control frames are copied into an `Output`, DATA payload is received straight into it: `slot` hands
out the bytes behind where the frame header will stand, `commit` writes the header and moves the
end. A slot that is never committed costs nothing.

An `Output` belongs to a connection only while it holds unsent bytes. An idle connection therefore
takes its slot from the pool's next `Output` and claims that only in `commit`, which works because
nothing happens in between (one thread, no await).

The bound: DATA stops short of the end of the buffer, so that there is room for control frames.
What does not fit there either spills into a bytearray and is sent after the buffer. A peer that
makes us answer and does not read is the only way to fill that, so the connection ends when a
peer's frame arrives while `overflowing`; what we ask for on our own is bounded by the number of
streams.
"""

from __future__ import annotations

from .errors import LocalProtocolError
from .frames import DATA, HEADER_SIZE, pack_header_into

OUTPUT_SIZE = 512 << 10
# Below this much room DATA had better wait for an empty buffer than be cut into small frames.
_WORTHWHILE = 4 << 10
_SPILL_MAX = 64 << 10


class Output:
    """A buffer for outgoing bytes: `buffer[start:end]` are unsent."""

    __slots__ = ("buffer", "end", "size", "start", "view")

    def __init__(self, size: int = OUTPUT_SIZE) -> None:
        self.buffer = bytearray(size)
        self.view = memoryview(self.buffer)
        self.size = size
        self.start = 0
        self.end = 0

    def __repr__(self) -> str:
        return f"<Output {self.end - self.start} of {self.size} bytes unsent>"


class OutputPool:
    """Lends outputs, so that only connections with unsent bytes hold one."""

    __slots__ = ("_free", "_keep", "size", "taken")

    def __init__(self, size: int = OUTPUT_SIZE, keep: int = 16) -> None:
        """Outputs of `size` bytes, of which at most `keep` are kept while unused."""
        self.size = size
        self.taken = 0
        self._keep = keep
        self._free: list[Output] = []

    def peek(self) -> Output:
        """The output that `take` will return next."""
        if not self._free:
            self._free.append(Output(self.size))
        return self._free[-1]

    def take(self) -> Output:
        """An empty output."""
        self.taken += 1
        return self._free.pop() if self._free else Output(self.size)

    def give(self, output: Output) -> None:
        """Take one back; what it held is forgotten."""
        output.start = output.end = 0
        self.taken -= 1
        if len(self._free) < self._keep:
            self._free.append(output)

    def __repr__(self) -> str:
        return f"<OutputPool {self.taken} taken, {len(self._free)} free>"


class Outbox:
    """One connection's unsent bytes; see the top of this file."""

    __slots__ = ("_data_end", "_output", "_pool", "_slot", "_spill", "_worthwhile")

    def __init__(self, pool: OutputPool) -> None:
        self._pool = pool
        self._output: Output | None = None
        self._spill = bytearray()
        # How many bytes the slot that was handed out last has.
        self._slot = 0
        self._data_end = pool.size - pool.size // 32 - HEADER_SIZE
        self._worthwhile = min(_WORTHWHILE, self._data_end)

    @property
    def empty(self) -> bool:
        return self._output is None

    @property
    def count(self) -> int:
        """How many bytes `pending()` has."""
        output = self._output
        return 0 if output is None else output.end - output.start

    @property
    def kept(self) -> int:
        """How much memory the unsent bytes take."""
        output = self._output
        return 0 if output is None else output.size + len(self._spill)

    @property
    def overflowing(self) -> bool:
        """More control frames are unsent than a peer that reads can cause."""
        return len(self._spill) > _SPILL_MAX

    @property
    def spilled(self) -> bool:
        return bool(self._spill)

    def put(self, frame: bytes) -> None:
        """Append a control frame."""
        output = self._output
        if output is None:
            output = self._output = self._pool.take()
        self._slot = 0
        end = output.end + len(frame)
        if self._spill or end > output.size:
            self._spill += frame
            return
        output.view[output.end : end] = frame
        output.end = end

    def room(self) -> int:
        """How much payload another DATA frame may have now; 0 when it had better wait."""
        output = self._output
        if output is None:
            return self._data_end
        room = self._data_end - output.end
        return room if room >= self._worthwhile and not self._spill else 0

    def slot(self, length: int) -> memoryview:
        """Where the payload of the next DATA frame goes; `length` is at most `room()`."""
        output = self._output or self._pool.peek()
        first = output.end + HEADER_SIZE
        self._slot = length
        return output.view[first : first + length]

    def commit(self, stream_id: int, length: int) -> None:
        """The last slot holds `length` bytes of payload: make a DATA frame of them."""
        if not 0 < length <= self._slot:
            raise LocalProtocolError(f"commit of {length} bytes, {self._slot} were reserved")
        output = self._output
        if output is None:
            output = self._output = self._pool.take()
        self._slot = 0
        end = output.end
        pack_header_into(output.buffer, end, length >> 8, length & 0xFF, DATA, 0, stream_id)
        output.end = end + HEADER_SIZE + length

    def pending(self) -> memoryview:
        """The next unsent bytes, valid until the next call of anything here."""
        output = self._output
        return _NOTHING if output is None else output.view[output.start : output.end]

    def sent(self, count: int) -> None:
        """The first `count` bytes of `pending()` were taken."""
        output = self._output
        if output is None or not 0 <= count <= output.end - output.start:
            raise LocalProtocolError(f"{count} bytes sent that were not pending")
        output.start += count
        if output.start == output.end:
            self._refill(output)

    def _refill(self, output: Output) -> None:
        """Go on with what has spilled, or give the buffer back."""
        spill = self._spill
        self._slot = 0
        if not spill:
            self._output = None
            self._pool.give(output)
            return
        count = min(len(spill), output.size)
        output.view[:count] = spill[:count]
        output.start, output.end = 0, count
        del spill[:count]

    def drop(self) -> None:
        """Forget everything: the transport is gone."""
        self._spill.clear()
        self._slot = 0
        if self._output is not None:
            self._pool.give(self._output)
            self._output = None

    def __repr__(self) -> str:
        return f"<Outbox {len(self.pending())} bytes pending, {len(self._spill)} spilled>"


_NOTHING = memoryview(b"")
