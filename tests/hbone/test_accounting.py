"""Property: every received byte is credited once, whatever happens to its stream."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pyambient.hbone import ErrorCode, LocalSettings, Stream

from .helpers import data, give, padded_data, rst, server, take

CONNECTION_WINDOW = 70_000
WINDOWS = LocalSettings(
    stream_window=20_000, shared_stream_window=6_000, connection_window=CONNECTION_WINDOW
)
IDS = st.sampled_from([1, 3, 5, 7])
SIZES = st.integers(1, 3000)


class Accounting(RuleBasedStateMachine):
    """Four streams, a peer that sends by the rules, and sinks that credit when they like."""

    def __init__(self) -> None:
        super().__init__()
        self.peer = server(settings=WINDOWS, hold=True)
        self.connection = self.peer.connection
        for stream_id in (1, 3, 5, 7):
            self.peer.give(self.peer.connect(stream_id))
        self.streams = {stream.id: stream for stream in self.peer.owner.streams}
        self.silent: set[int] = set()
        self.piece = 1 << 20

    def _send(self, stream_id: int, raw: bytes, *, last: bool = False) -> None:
        """Send a frame of the peer, if its windows allow, in pieces."""
        room = min(self.streams[stream_id].receive_window, self.connection._receive_window)
        if stream_id in self.silent or len(raw) > room:
            return
        if last:
            self.silent.add(stream_id)
        for start in range(0, len(raw), self.piece):
            give(self.connection, raw[start : start + self.piece])

    @rule(piece=st.integers(1, 5000))
    def cut_differently(self, piece: int) -> None:
        self.piece = piece

    @rule(stream_id=IDS, size=SIZES)
    def sends_data(self, stream_id: int, size: int) -> None:
        self._send(stream_id, data(stream_id, bytes(size)))

    @rule(stream_id=IDS, size=SIZES, padding=st.integers(0, 255))
    def sends_padded_data(self, stream_id: int, size: int, padding: int) -> None:
        self._send(stream_id, padded_data(stream_id, bytes(size), padding))

    @rule(stream_id=IDS, size=SIZES)
    def ends(self, stream_id: int, size: int) -> None:
        self._send(stream_id, data(stream_id, bytes(size), end=True), last=True)

    @rule(stream_id=IDS)
    def resets(self, stream_id: int) -> None:
        self._send(stream_id, rst(stream_id), last=True)

    @rule(stream_id=IDS, size=SIZES)
    def we_credit(self, stream_id: int, size: int) -> None:
        stream = self.streams[stream_id]
        self.connection.credit(stream, min(size, stream.uncredited))

    @rule(stream_id=IDS)
    def we_end(self, stream_id: int) -> None:
        if self.streams[stream_id].can_send:
            self.connection.end(self.streams[stream_id])

    @rule(stream_id=IDS)
    def we_reset(self, stream_id: int) -> None:
        self.connection.reset(self.streams[stream_id], ErrorCode.CANCEL)

    @rule()
    def we_send(self) -> None:
        take(self.connection)

    @invariant()
    def nothing_is_lost(self) -> None:
        """Window left, credit not sent yet, and what sinks hold make up the window."""
        held = sum(stream.uncredited for stream in self.streams.values())
        connection = self.connection
        assert connection._receive_window + connection._consumed + held == CONNECTION_WINDOW
        assert all(_sane(stream) for stream in self.streams.values())

    def teardown(self) -> None:
        """When every sink has credited all, the peer may send at least three quarters."""
        for stream in self.streams.values():
            self.connection.credit(stream, stream.uncredited)
        assert self.connection._receive_window * 4 > CONNECTION_WINDOW * 3


def _sane(stream: Stream) -> bool:
    return 0 <= stream.uncredited <= stream.full_window


TestAccounting = Accounting.TestCase
TestAccounting.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
