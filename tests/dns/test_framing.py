"""Messages on a stream, however it is cut."""

from __future__ import annotations

import pytest

from pyambient.dns.framing import MAX_MESSAGE, Frames, framed


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_messages_come_out_as_they_went_in(step):
    messages = [b"", b"x", bytes(range(256)) * 3]
    stream = b"".join(map(framed, messages))
    frames, received = Frames(), []
    for start in range(0, len(stream), step):
        frames.feed(stream[start : start + step])
        while (message := frames.next()) is not None:
            received.append(message)
    assert received == messages


def test_the_longest_message_has_a_length_of_two_bytes():
    frames = Frames()
    frames.feed(framed(bytes(MAX_MESSAGE)))
    assert frames.next() == bytes(MAX_MESSAGE)
    assert frames.next() is None
