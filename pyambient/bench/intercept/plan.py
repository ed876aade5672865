"""Which cells a run has, and in which order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

from .settings import Settings
from .work import (
    ALL_WORK,
    CLIENT,
    CONNECTIONS,
    DIRECT,
    EXPLICIT,
    FAMILIES,
    NULL,
    Cell,
    Subject,
)

Group = list[Cell]
"""Cells whose samples are compared: they are measured one right after the other."""


def subjects(
    backends: Iterable[str], enrolled: Iterable[str], proxies: Iterable[str]
) -> list[Subject]:
    """Both that captures are compared with, and each backend with each of the pods enrolled."""
    chosen = itertools.product(proxies, backends, enrolled)
    captures = [Subject(backend, whose, proxy) for proxy, backend, whose in chosen]
    return [DIRECT, EXPLICIT, *(s for s in captures if s.captured or s.proxy == NULL)]


def traffic(settings: Settings) -> list[Group]:
    """A group for each kind of work and family, and one for the cost of exclusions."""
    chosen = subjects(settings.backends, settings.enrolled, settings.proxies)
    work = [work for work in ALL_WORK if work.name in settings.work]
    groups = [
        [Cell(subject, kind, family) for subject in chosen if subject.does(kind)]
        for kind, family in itertools.product(work, FAMILIES)
    ]
    return [*groups, *_exclusions(settings)]


def _exclusions(settings: Settings) -> Iterator[Group]:
    captures = [Subject(backend, CLIENT) for backend in settings.backends]
    for family in FAMILIES if settings.excluded else ():
        yield [
            Cell(subject, CONNECTIONS, family, count)
            for subject, count in itertools.product(captures, settings.excluded)
        ]


def crowded(backend: str, count: int) -> Group:
    """One pod of `count` that are enrolled, beside a client that asks a proxy explicitly."""
    crowd = (count, backend)
    captured = Subject(backend, CLIENT)
    return [Cell(subject, CONNECTIONS, "v4", crowd=crowd) for subject in (EXPLICIT, captured)]


def shuffled(groups: Sequence[Group], number: int) -> list[Group]:
    """The groups of a round, and the cells of each, in an order that the round's number decides."""
    order = random.Random(number)  # noqa: S311 - an order, not a secret
    return [order.sample(group, len(group)) for group in order.sample(groups, len(groups))]
