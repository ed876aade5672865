"""Statistics for a machine that others use too: interleaved rounds, medians, ratios.

What is compared is measured in turn, round after round, in an order that changes; a ratio is taken
within a round and the median of these is the result. So what the machine does to all of a round
does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

Sample = Mapping[str, float]
"""What one measurement gave, by name."""
T = TypeVar("T")


class Results:
    """Samples by work and subject, in the order of the rounds."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, list[Sample]]] = {}

    def add(self, work: str, subject: str, sample: Sample) -> None:
        self.samples.setdefault(work, {}).setdefault(subject, []).append(sample)

    def of(self, work: str, subject: str) -> list[Sample]:
        return self.samples.get(work, {}).get(subject, [])

    def median(self, work: str, subject: str, value: Callable[[Sample], float]) -> float | None:
        """The median of `value` over the rounds; None if there were none."""
        samples = self.of(work, subject)
        return statistics.median(map(value, samples)) if samples else None

    def ratio(
        self, work: str, subject: str, other: str, value: Callable[[Sample], float]
    ) -> float | None:
        """The median over the rounds of one subject's value by the other's; None if unmeasured."""
        ratios = self.ratios((work, subject), (work, other), value)
        return statistics.median(ratios) if ratios else None

    def ratios(
        self, one: tuple[str, str], other: tuple[str, str], value: Callable[[Sample], float]
    ) -> list[float]:
        """One value by another, round by round; each is given by its work and its subject.

        A sample's round is its "round", where it has one, else its place among its subject's.
        """
        ours, theirs = (_by_round(self.of(*which)) for which in (one, other))
        pairs = [(ours[number], theirs[number]) for number in ours if number in theirs]
        return [value(a) / value(b) for a, b in pairs if value(b)]

    def against(
        self, work: str, other: str, subject: str, value: Callable[[Sample], float]
    ) -> float | None:
        """The same for two kinds of work of one subject."""
        ratios = self.ratios((work, subject), (other, subject), value)
        return statistics.median(ratios) if ratios else None

    def __repr__(self) -> str:
        return f"<Results of {', '.join(self.samples)}>"


def _by_round(samples: Sequence[Sample]) -> dict[float, Sample]:
    return {sample.get("round", place): sample for place, sample in enumerate(samples)}


def turns(subjects: Sequence[T], rounds: int) -> Iterator[Sequence[T]]:
    """The subjects for each round, each time beginning with another one."""
    for number in range(rounds):
        first = number % len(subjects)
        yield [*subjects[first:], *subjects[:first]]
