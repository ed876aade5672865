"""The table: each row's bar, and what of the samples it is judged by. Pure functions of results."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from pyambient.bench.bars import Figure, Row
from pyambient.bench.rounds import Results, Sample
from pyambient.model.numbers import MAX_STREAMS_OPENED

from . import scenarios, work
from .subjects import ENVOY, OURS, OURS_16K, OURS_UNSHARED


def compared(
    name: str,
    done: work.Work,
    value: Callable[[Sample], float],
    unit: str,
    *,
    ours: str = OURS,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """A row that is a ratio of ours to Envoy's."""
    return Row(
        f"{done.name}: {name}",
        lambda results: results.ratio(done.name, ours, ENVOY, value),
        (
            lambda results: results.median(done.name, ours, value),
            lambda results: results.median(done.name, ENVOY, value),
        ),
        unit,
        at_least,
        at_most,
    )


def _connections(done: work.Work) -> tuple[Row, ...]:
    return (
        compared("rate", done, work.rate, "/s", at_least=1.2),
        compared("CPU", done, work.cpu_per_operation, "µs", at_most=0.85),
    )


def _bulk(done: work.Work) -> Row:
    return compared("", done, work.gigabits_per_cpu_second, "Gbit/CPU-s", at_least=1.1)


def _small_frames(done: work.Work) -> Row:
    name = "ours with 16 KiB frames"
    return compared(name, done, work.gigabits_per_cpu_second, "Gbit/CPU-s", ours=OURS_16K)


def against(
    name: str,
    done: tuple[str, str],
    value: Callable[[Sample], float],
    unit: str,
    *,
    at_most: float,
) -> Row:
    """A row that compares ours with ours: one kind of work by another."""
    one, other = done
    return Row(
        name,
        lambda results: results.against(one, other, OURS, value),
        (
            lambda results: results.median(one, OURS, value),
            lambda results: results.median(other, OURS, value),
        ),
        unit,
        at_most=at_most,
    )


def absolute(
    name: str,
    figure: Figure,
    unit: str,
    *,
    theirs: Figure = lambda _: None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """A row whose figure is a number of its own."""
    return Row(name, figure, (figure, theirs), unit, at_least, at_most)


def _p99_milliseconds(sample: Sample) -> float:
    return sample["p99"] * 1e-3


def _kept(results: Results) -> float | None:
    """How much of an upload's rate is left when round trips share its tunnel."""
    shared = results.of(scenarios.SHARED, OURS)
    alone = results.of(scenarios.BULK_ALONE, OURS)
    kept = [s["bulk"] / (a["bytes"] / a["seconds"]) for s, a in zip(shared, alone, strict=True)]
    return statistics.median(kept) if kept else None


def _kilobytes(subject: str) -> Figure:
    """What a connection and its part of a tunnel take, on the side that needs more."""
    return lambda results: results.median(
        scenarios.MEMORY, subject, lambda s: max(s["client"], s["server"]) / 1024
    )


def _per_tunnel(results: Results) -> float | None:
    """Of two subjects, one with a tunnel for each connection, one with a tunnel for a hundred."""
    alone, shared = _kilobytes(OURS_UNSHARED)(results), _kilobytes(OURS)(results)
    if alone is None or shared is None:
        return None
    return (alone - shared) / (1 - 1 / MAX_STREAMS_OPENED)


def _per_connection(results: Results) -> float | None:
    """What is left when the tunnel's part is taken away."""
    shared, tunnel = _kilobytes(OURS)(results), _per_tunnel(results)
    return None if shared is None or tunnel is None else shared - tunnel / MAX_STREAMS_OPENED


def _base(subject: str) -> Figure:
    return lambda results: results.median(scenarios.MEMORY, subject, lambda s: s["base"] / 2**20)


def _hostile(name: str) -> Row:
    done = (name, scenarios.QUIET)
    return against(f"{name}: p99", done, _p99_milliseconds, "ms", at_most=2)


ROWS: tuple[Row, ...] = (
    *_connections(work.CONNECTIONS_16),
    *_connections(work.CONNECTIONS_64),
    compared("CPU", work.TRIPS, work.cpu_per_operation, "µs", at_most=0.95),
    compared("CPU", work.LONE, work.cpu_per_operation, "µs", at_most=1.2),
    compared("p50", work.LONE, work.median_latency, "µs", at_most=1.15),
    *map(_bulk, (work.UPLOAD, work.DOWNLOAD, work.UPLOADS, work.DOWNLOADS)),
    *map(_small_frames, (work.UPLOAD, work.DOWNLOAD)),
    absolute(
        f"{scenarios.SHARED}: p99",
        lambda results: results.median(scenarios.SHARED, OURS, _p99_milliseconds),
        "ms",
        at_most=3,
    ),
    absolute(f"{scenarios.SHARED}: what the upload keeps", _kept, "part", at_least=0.8),
    absolute(
        "memory of an idle connection",
        _per_connection,
        "KB",
        theirs=_kilobytes(ENVOY),
        at_most=2,
    ),
    absolute("memory of a tunnel", _per_tunnel, "KB", at_most=64),
    absolute("memory of a worker", _base(OURS), "MB", theirs=_base(ENVOY), at_most=60),
    against(
        f"{scenarios.CROWD_TRIPS}: p99",
        (scenarios.CROWD_TRIPS, scenarios.CALM_TRIPS),
        _p99_milliseconds,
        "ms",
        at_most=1.5,
    ),
    against(
        f"{scenarios.CROWD_CONNECTIONS}: CPU",
        (scenarios.CROWD_CONNECTIONS, scenarios.CALM_CONNECTIONS),
        work.cpu_per_operation,
        "µs",
        at_most=1.3,
    ),
    *map(_hostile, (scenarios.DROPPED, scenarios.HANDSHAKES, scenarios.DEAF)),
)
