"""Property: whatever two ends do in whatever order, each hears what the other said.

A state machine drives a client and a server: ours and hyper-h2's as the oracle, in both roles,
and ours alone. Everything is under way for as long as the machine likes, and arrives in cuts of
its choosing, so frames cross. What must hold:

* nobody is accused: neither end finds fault with a byte of the other's;
* what was received of a stream is a beginning of what was sent, and all of it once everything has
  arrived, if nobody has reset the stream; its end is heard then, and never before;
* both ends have the same idea of every window;
* no byte of our windows is lost, and no stream is forgotten or kept.
"""

from __future__ import annotations

import sys
from typing import ClassVar

from h2.settings import SettingCodes
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyambient.hbone import ErrorCode, Role

from .ends import End, Heard, Ours, Theirs

_STREAMS_MAX = 6
_EVERYTHING = 1 << 30
WHICH = st.integers(0, 1)
CHOICE = st.integers(0, _STREAMS_MAX - 1)
AMOUNT = st.one_of(st.integers(1, 100), st.integers(1, 70_000), st.just(600_000))
CUT = st.one_of(st.integers(1, 40), st.integers(1, 100_000), st.just(_EVERYTHING))
CODES = st.sampled_from((ErrorCode.CANCEL, ErrorCode.CONNECT_ERROR, ErrorCode.NO_ERROR))


class Model(RuleBasedStateMachine):
    """A client and a server; the subclasses say whose."""

    kinds: ClassVar[tuple[type[Ours | Theirs], type[Ours | Theirs]]]
    ends: tuple[Ours | Theirs, Ours | Theirs]

    @initialize()
    def meet(self) -> None:
        client, server = self.kinds
        self.ends = client(Role.CLIENT), server(Role.SERVER)
        self.byte = 0
        self._carry_all()

    # What the ends do

    @rule()
    @precondition(lambda self: self._can_open())
    def open(self) -> None:
        self.ends[0].open()

    def _can_open(self) -> bool:
        return len(self.ends[0].heard) < _STREAMS_MAX and self.ends[0].can_open()

    @rule(choice=CHOICE, status=st.sampled_from((200, 200, 200, 503)))
    @precondition(lambda self: self.ends[1].answerable())
    def answer(self, choice: int, status: int) -> None:
        self.ends[1].answer(_chosen(self.ends[1].answerable(), choice), status)

    @rule(which=WHICH, choice=CHOICE, amount=AMOUNT)
    def send(self, which: int, choice: int, amount: int) -> None:
        """As much as the windows allow."""
        end = self.ends[which]
        if end.sending():
            self.byte = (self.byte + 1) % 256
            end.send(_chosen(end.sending(), choice), bytes((self.byte,)) * amount)

    @rule(which=WHICH, choice=CHOICE, amount=AMOUNT)
    def credit(self, which: int, choice: int, amount: int) -> None:
        end = self.ends[which]
        if end.owed():
            end.credit(_chosen(end.owed(), choice), amount)

    @rule(which=WHICH, choice=CHOICE)
    def end(self, which: int, choice: int) -> None:
        end = self.ends[which]
        if end.endable():
            end.end(_chosen(end.endable(), choice))

    @rule(which=WHICH, choice=CHOICE, code=CODES)
    def reset(self, which: int, choice: int, code: ErrorCode) -> None:
        end = self.ends[which]
        if end.resettable():
            end.reset(_chosen(end.resettable(), choice), code)

    @rule(which=WHICH)
    def ping(self, which: int) -> None:
        self.ends[which].ping()

    # What the network does

    @rule(which=WHICH, cut=CUT)
    def carry(self, which: int, cut: int) -> None:
        """Some bytes arrive, perhaps half a frame."""
        self.ends[1 - which].give(self.ends[which].take(cut))

    @rule()
    def carry_all(self) -> None:
        """Everything arrives, and what is said in answer: now the ends have to agree."""
        self._carry_all()
        self._compare()

    def _carry_all(self) -> None:
        for _ in range(10_000):
            forth, back = (end.take(_EVERYTHING) for end in self.ends)
            if not forth and not back:
                return
            self.ends[1].give(forth)
            self.ends[0].give(back)
        raise AssertionError("the two ends never fall silent")

    # What must hold

    @invariant()
    def nothing_is_heard_that_was_not_said(self) -> None:
        for one, other in _both(self.ends):
            for stream_id, heard in one.heard.items():
                said = other.heard.get(stream_id, Heard())
                assert said.sent.startswith(heard.received)
                assert not heard.ended or said.end_sent or said.resets

    @invariant()
    def the_books_are_right(self) -> None:
        for end in self.ends:
            if isinstance(end, Ours):
                end.check_books()

    def _compare(self) -> None:
        """With nothing under way."""
        client, server = self.ends
        for stream_id, heard in client.heard.items():
            if not heard.whole or not server.heard[stream_id].whole:
                continue
            for one, other in _both(self.ends):
                assert one.heard[stream_id].received == other.heard[stream_id].sent
                assert one.heard[stream_id].ended is other.heard[stream_id].end_sent
            windows = client.windows(stream_id), server.windows(stream_id)
            if None not in windows:
                assert windows[0] == tuple(reversed(windows[1] or ()))

    def teardown(self) -> None:
        """Once all is consumed and ended, all streams are off the books."""
        if not hasattr(self, "ends") or sys.exc_info()[0] is not None:
            # What two ends do after a failure would be reported in its place.
            return
        self._settle()
        while self.ends[1].answerable():
            self.ends[1].answer(self.ends[1].answerable()[0], 200)
        self._settle()
        for end in self.ends:
            for stream_id in end.endable():
                end.end(stream_id)
            for stream_id, heard in end.heard.items():
                if heard.status not in {None, 200} and stream_id in end.resettable():
                    end.reset(stream_id, ErrorCode.CANCEL)
        self._settle()
        for end in self.ends:
            if isinstance(end, Ours):
                assert end.connection.streams == {}

    def _settle(self) -> None:
        """Everything arrives and is consumed.

        All streams are credited, if only by 0: h2 opens a window that it has shrunk only then.
        """
        self._carry_all()
        for end in self.ends:
            for stream_id in end.heard:
                end.credit(stream_id, _EVERYTHING)
        self._carry_all()
        self._compare()
        self.the_books_are_right()


def _both(ends: tuple[End, End]) -> tuple[tuple[End, End], tuple[End, End]]:
    return ends, (ends[1], ends[0])


def _chosen(streams: list[int], choice: int) -> int:
    return streams[choice % len(streams)]


class _WithSettings(Model):
    """hyper-h2 may change its settings at any time."""

    @rule(size=st.sampled_from((1, 100, 16_384, 65_535, 1 << 20)))
    @precondition(lambda self: self._theirs().may_change())
    def change_windows(self, size: int) -> None:
        self._theirs().change(SettingCodes.INITIAL_WINDOW_SIZE, size)

    @rule(size=st.sampled_from((16_384, 20_000, 1 << 20)))
    @precondition(lambda self: self._theirs().may_change())
    def change_frames(self, size: int) -> None:
        self._theirs().change(SettingCodes.MAX_FRAME_SIZE, size)

    @rule(size=st.sampled_from((0, 100, 4096)))
    @precondition(lambda self: self._theirs().may_change())
    def change_table(self, size: int) -> None:
        self._theirs().change(SettingCodes.HEADER_TABLE_SIZE, size)

    def _theirs(self) -> Theirs:
        (theirs,) = (end for end in self.ends if isinstance(end, Theirs))
        return theirs


class OurClient(_WithSettings):
    """Our client and a server of hyper-h2's."""

    kinds = (Ours, Theirs)


class OurServer(_WithSettings):
    """Our server and a client of hyper-h2's."""

    kinds = (Theirs, Ours)


class OursAlone(Model):
    """Both ends are ours, and may leave while streams live."""

    kinds = (Ours, Ours)

    @rule(which=WHICH)
    @precondition(lambda self: len(self.ends[0].heard) > 1)
    def leave(self, which: int) -> None:
        """Say GOAWAY: what is open goes on, what is under way is served or refused."""
        end = self.ends[which]
        assert isinstance(end, Ours)
        end.connection.go_away()


_SETTINGS = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestOurClient = OurClient.TestCase
TestOurServer = OurServer.TestCase
TestOursAlone = OursAlone.TestCase
for _case in (TestOurClient, TestOurServer, TestOursAlone):
    _case.settings = _SETTINGS
