"""What the test bed tells its user when it cannot go on."""

from __future__ import annotations


class BedError(Exception):
    """One line: what happened; what to do next."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
