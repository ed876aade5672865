"""The work of a round: what the load tool does, each with the subjects that do it."""

from __future__ import annotations

from dataclasses import dataclass

from pyambient.bench.rounds import Sample

from .subjects import ECHO, ENVOY, OURS, OURS_16K, SINK, SOURCE

EVERYBODY = (OURS, ENVOY)
WITH_SMALL_FRAMES = (OURS, OURS_16K, ENVOY)


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of load, by the name its samples are kept under."""

    name: str
    kind: str
    port: int
    at_once: int
    subjects: tuple[str, ...] = EVERYBODY


LONE = Work("one connection of round trips", "trips", ECHO, 1)
TRIPS = Work("32 connections of round trips", "trips", ECHO, 32)
CONNECTIONS_16 = Work("connections, 16 at a time", "connections", ECHO, 16)
CONNECTIONS_64 = Work("connections, 64 at a time", "connections", ECHO, 64)
UPLOAD = Work("upload, 1 stream", "upload", SINK, 1, WITH_SMALL_FRAMES)
DOWNLOAD = Work("download, 1 stream", "download", SOURCE, 1, WITH_SMALL_FRAMES)
UPLOADS = Work("upload, 8 streams", "upload", SINK, 8)
DOWNLOADS = Work("download, 8 streams", "download", SOURCE, 8)

ROUND = (CONNECTIONS_16, CONNECTIONS_64, TRIPS, LONE, UPLOAD, DOWNLOAD, UPLOADS, DOWNLOADS)


def cpu(sample: Sample) -> float:
    """CPU seconds of both proxies."""
    return sample["cpu_client"] + sample["cpu_server"]


def rate(sample: Sample) -> float:
    """Operations per second."""
    return sample["operations"] / sample["seconds"]


def cpu_per_operation(sample: Sample) -> float:
    """Microseconds of both proxies."""
    return cpu(sample) / sample["operations"] * 1e6


def gigabits_per_cpu_second(sample: Sample) -> float:
    return sample["bytes"] * 8e-9 / cpu(sample)


def median_latency(sample: Sample) -> float:
    """Microseconds."""
    return sample["p50"]
