"""A warning that is due all the time is a line now and then."""

from __future__ import annotations

from pyambient.observe.seldom import Seldom


class Log:
    """A logger that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def warning(self, message, **fields):
        self.lines.append((message, fields))


def test_the_first_is_logged_and_the_next_says_how_many_were_not():
    now = 0.0
    log = Log()
    seldom = Seldom(log, "too many", interval=10, clock=lambda: now)
    for number in range(5):
        seldom.warn(number=number)
    now += 9.9
    seldom.warn(number=5)
    assert log.lines == [("too many", {"times": 1, "number": 0})]
    now += 0.2
    seldom.warn(number=6)
    assert log.lines[1:] == [("too many", {"times": 6, "number": 6})]
