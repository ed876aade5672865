"""Who serves the captured pods of a cell: a proxy in C that costs next to nothing, or ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final, Protocol

from pyambient.bench import proxy
from pyambient.bench.load import Load
from pyambient.bench.rounds import Sample
from pyambient.hbone import LocalSettings
from pyambient.netns import Netns

from .bed import Bed

# A proxy that nobody speaks to has a timer now and then.
_LEAST_SHARE: Final = 0.1


class Proxy(Protocol):
    """A running one."""

    @property
    def pid(self) -> int: ...

    def seen(self, sample: Sample, least: float) -> float:
        """How many connections and queries came to it until `sample` was taken; it is done then.

        `least` is how many there had to be.
        """

    def end(self) -> None: ...


class Null:
    """null.c in one pod; it counts for itself."""

    def __init__(self, program: Path, bed: Bed, pod: str, *words: object) -> None:
        self._load = Load(program, bed.proxy(pod), *words)
        self._load.wait_warm()

    @property
    def pid(self) -> int:
        return self._load.pid

    def seen(self, sample: Sample, least: float) -> float:  # noqa: ARG002 - it has counted
        words = self._load.last_words()
        return words["accepted"] + words["answered"]

    def end(self) -> None:
        self._load.end()

    def __repr__(self) -> str:
        return f"<Null {self._load!r}>"


class Real:
    """pyambient's proxy for all enrolled pods, as on one node."""

    def __init__(self, bed: Bed) -> None:
        settings = {
            "mesh": "",
            "ca_dir": str(bed.node.work / "ca"),
            "log": str(bed.node.work / "log"),
            "http2": dataclasses.asdict(LocalSettings()),
            "pods": [_told(bed, name) for name in bed.enrolled],
        }
        pods = [pod.netns for pod in bed.enrolled.values()]
        with Netns.own() as own:
            self._process = proxy.start(bed.proxy_in(own), settings, pods)

    @property
    def pid(self) -> int:
        return self._process.pid

    def seen(self, sample: Sample, least: float) -> float:
        """All of them if it did a share of the work, else none: it does not count."""
        worked = sample["cpu_proxy"] > _LEAST_SHARE * sample["cpu"]
        return least if worked else 0

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def __repr__(self) -> str:
        return f"<Real {self._process!r}>"


def _told(bed: Bed, name: str) -> dict[str, Any]:
    """What the agent would tell of a pod; `bpf` notes in a map whom a query was for."""
    netns = bed.enrolled[name].netns
    told = {
        "name": name,
        "namespace": "bench",
        "fd": netns.fd,
        "backend": bed.backend,
        "addresses": bed.addresses(name),
    }
    if bed.backend == "bpf":
        told["dns"] = {"bpffs": str(bed.node.site.bpffs), "netns_cookie": netns.cookie()}
    elif not bed.steers:
        told["dns"] = {}
    return told
