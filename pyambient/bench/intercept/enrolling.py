"""How long enrolling one pod takes, with the agent and the proxy that users run.

The clock runs from the request at the agent's socket to its answer: by then the pod is captured,
the gate included, and the proxy has acknowledged that it listens. The pod's certificate comes
later and is not waited for. The 1st pod of a node is enrolled while no other is, the 200th beside
199 others.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pyambient.agent.client import ask
from pyambient.agent.config import RunDir
from pyambient.bench.rounds import Sample
from pyambient.children import module
from pyambient.errors import PyambientError
from pyambient.netns import Netns

from .crowd import Crowd

FIRST, LATER = 1, 200
_PATIENCE: Final = 20.0
_LOG: Final = "log"


class Mesh:
    """A running agent and proxy with a run directory of their own."""

    def __init__(self, directory: Path, cgroup: Path, backend: str) -> None:
        self.run_dir = RunDir(directory)
        self._backend = backend
        self._processes: list[subprocess.Popen[bytes]] = []
        directory.mkdir(parents=True)
        self._log = directory / _LOG
        for command in ("agent", "proxy"):
            self._start(command, f"--cgroup={cgroup}")
        self._wait_for_both()

    def _start(self, *words: str) -> None:
        line = module("pyambient", f"--run-dir={self.run_dir.path}", *words)
        with self._log.open("ab") as log:
            self._processes.append(subprocess.Popen(line, stdout=log, stderr=log))

    def _wait_for_both(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not self._is_ready():
            if time.monotonic() > deadline or any(p.poll() is not None for p in self._processes):
                self.end()
                raise PyambientError("agent and proxy did not start", self._last_words())
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        with contextlib.suppress(PyambientError):
            return bool(ask(self.run_dir, "status")["proxies"])
        return False

    def _last_words(self) -> str:
        return self._log.read_text("utf-8").strip().rpartition("\n")[2]

    def enrol(self, pod: Netns) -> float:
        """How long it took, in seconds."""
        began = time.perf_counter()
        ask(
            self.run_dir,
            "enroll",
            netns=_path(pod),
            name=pod.name,
            namespace="bench",
            service_account="bench",
            backend=self._backend,
        )
        return time.perf_counter() - began

    def free(self, pod: Netns) -> float:
        """How long it took, in seconds."""
        began = time.perf_counter()
        ask(self.run_dir, "unenroll", netns=_path(pod), drain_timeout=0)
        return time.perf_counter() - began

    def end(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()

    def __repr__(self) -> str:
        return f"<Mesh in {self.run_dir.path}>"


def _path(pod: Netns) -> str:
    return f"/proc/{os.getpid()}/fd/{pod.fd}"


def latencies(mesh: Mesh, crowd: Crowd, place: int, times: int) -> Iterator[Sample]:
    """Enrol the pod at this place `times` times, beside all before it; it stays enrolled then."""
    for pod in crowd.grow(place - 1):
        mesh.enrol(pod)
    (pod,) = crowd.grow(place)
    for _ in range(times):
        took = mesh.enrol(pod)
        yield {"enrol": took, "free": mesh.free(pod)}
    mesh.enrol(pod)
