"""The real thing under test: `pyambient up` as its users start it, driven by its command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pyambient

from .loader import LOADER
from .network import Bed, BedPod
from .patience import patience
from .seccomp import nobpf
from .snapshot import changes, kernel_state, without_devices

_SOURCES = Path(pyambient.__file__).parent.parent
# What a command may take: with bcc an enrolment compiles each program, a second of CPU for each.
_SECONDS = {"libbpf": 60, "bcc": 240}
_START_TIMEOUT = 20.0
_STOP_TIMEOUT = patience(20)
_EMPTY_MESH = "workloads: []\n"
# Joins the cgroup named first, then becomes the command.
_IN_CGROUP = 'echo 0 > "$0/cgroup.procs" && exec "$@"'


class Mesh:
    """A running `pyambient up` in the bed's sub-tree, with state below `directory`.

    On leaving, every pod is un-enrolled, the program stopped, and each pod that was enrolled must
    be what it was before. The log is printed then; pytest shows it with a failure.
    """

    def __init__(
        self,
        bed: Bed,
        directory: Path,
        *,
        without_bpf: bool = False,
        loader: str = LOADER,
        options: Sequence[str] = (),
    ) -> None:
        """`options` are those of `up`, beside what every test needs."""
        self.bed = bed
        self.loader = loader
        self.options = tuple(options)
        self.run_dir = directory / "run"
        self.mesh_file = directory / "mesh.yaml"
        self.ca_dir = directory / "ca"
        self.log = directory / "log"
        self.without_bpf = without_bpf
        self.process: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[str]] = []
        self._before: dict[BedPod, tuple[dict[str, Any], set[str]]] = {}

    def __enter__(self) -> Self:
        self.mesh_file.write_text(_EMPTY_MESH)
        self.start()
        return self

    def start(self) -> None:
        """Start `up` in a cgroup of its own below the bed's, and wait until it says it is ready."""
        own = self.bed.cgroup.path / "mesh"
        own.mkdir(exist_ok=True)
        self.log.touch()
        said = self._said_ready()
        line = ["setpriv", "--pdeathsig", "TERM", "sh", "-c", _IN_CGROUP, str(own)]
        line += self._command("up", *self._up_options())
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                line,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.wait_until(lambda: self._said_ready() > said, "'pyambient is ready' in the log")

    def _said_ready(self) -> int:
        return self.log.read_text(errors="replace").count("pyambient is ready")

    def _up_options(self) -> list[str]:
        return [
            f"--cgroup={self.bed.cgroup.path}",
            f"--mesh={self.mesh_file}",
            f"--ca-dir={self.ca_dir}",
            "--log-format=json",
            f"--bpf-loader={self.loader}",
            *self.options,
        ]

    def _command(self, verb: str, *words: str) -> list[str]:
        line = [sys.executable, "-m", "pyambient", verb, f"--run-dir={self.run_dir}", *words]
        return nobpf(*line) if self.without_bpf else line

    @staticmethod
    def _environment() -> dict[str, str]:
        kept = {name: v for name, v in os.environ.items() if not name.startswith("PYAMBIENT_")}
        return kept | {"PYTHONPATH": str(_SOURCES), "PYTHONWARNINGS": "error"}

    def cli(self, verb: str, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run `pyambient VERB`; fails the test unless it exits with `code`."""
        done = subprocess.run(
            self._command(verb, *words),
            env=self._environment(),
            text=True,
            capture_output=True,
            check=False,
            timeout=patience(_SECONDS[self.loader]),
        )
        assert done.returncode == code, f"{verb} {words}: {done.stdout}{done.stderr}"
        return done

    def enroll(
        self,
        pod: BedPod,
        namespace: str = "default",
        service_account: str | None = None,
        backend: str | None = None,
    ) -> None:
        """Enrol by the CLI; the service account is the pod's name unless told otherwise."""
        if pod not in self._before:
            before = kernel_state(pod)
            if self._before:
                # The node as it was before the first enrolment, not between two of them.
                first, _ = next(iter(self._before.values()))
                before["node"] = first["node"]
            self._before[pod] = (before, set(pod.veths))
        words = [f"--namespace={namespace}", f"--service-account={service_account or pod.name}"]
        if backend:
            words.append(f"--backend={backend}")
        self.cli("enroll", pod.name, *words)

    def unenroll(self, pod: BedPod) -> None:
        """Un-enrol and wait for the drain."""
        self.cli("unenroll", pod.name)

    def start_unenrolling(self, pod: BedPod) -> subprocess.Popen[str]:
        """Begin to un-enrol; the process ends when the pod is drained and clean."""
        line = self._command("unenroll", pod.name)
        process = subprocess.Popen(line, env=self._environment(), text=True)
        self._started.append(process)
        return process

    def spawn(self, verb: str, *words: str) -> subprocess.Popen[str]:
        """Start `pyambient VERB`, to be ended by the test, with pipes to what it says."""
        return subprocess.Popen(
            self._command(verb, *words),
            env=self._environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def status(self) -> dict[str, Any]:
        """What `pyambient status -o json` says."""
        return dict(json.loads(self.cli("status", "--output=json").stdout))

    def write_mesh(self, text: str) -> None:
        """Replace the mesh file as an editor does."""
        temporary = self.mesh_file.with_suffix(".new")
        temporary.write_text(text)
        temporary.rename(self.mesh_file)

    def lines(self) -> Iterator[Mapping[str, Any]]:
        """All of the log so far; a line that is not JSON becomes {"message": line}."""
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                yield {"message": line}

    def access_log(
        self, fields: Mapping[str, Any], count: int = 1, timeout: float = 10
    ) -> list[Mapping[str, Any]]:
        """Wait for at least `count` lines of ended connections with all `fields`; all of them."""
        wanted = {"scope": "access", **fields}

        def matching() -> list[Mapping[str, Any]]:
            return [line for line in self.lines() if wanted.items() <= line.items()]

        self.wait_until(lambda: len(matching()) >= count, f"access log lines {wanted}", timeout)
        return matching()

    def wait_until(
        self, condition: Callable[[], Any], what: str, timeout: float = _START_TIMEOUT
    ) -> None:
        """Wait for a condition; fails at once when `up` ends."""
        deadline = time.monotonic() + patience(timeout)
        while not condition():
            assert self.process is not None
            assert self.process.poll() is None, f"up ended early:\n{self.log.read_text()}"
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} after {timeout:.0f} s")
            time.sleep(0.02)

    def stop(self) -> int:
        """Stop `up` as a service manager does; its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_STOP_TIMEOUT)

    def kill(self) -> None:
        """End `up` and all it started without a chance to tidy up."""
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait(_STOP_TIMEOUT)
        deadline = time.monotonic() + _STOP_TIMEOUT
        while self._pids():
            assert time.monotonic() < deadline, f"still there: {self._pids()}"
            time.sleep(0.01)

    def _pids(self) -> list[int]:
        directories = (self.bed.cgroup.path / "mesh", self.bed.cgroup.proxy)
        files = [directory / "cgroup.procs" for directory in directories]
        return [int(pid) for file in files if file.exists() for pid in file.read_text().split()]

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        try:
            self.cli("unenroll", "--all", "--drain-timeout=0")
            code = self.stop()
            assert code == 0, f"up ended with {code}"
            self.assert_nothing_left()
        finally:
            self.kill()
            print(self.log.read_text(errors="replace"))  # noqa: T201 - pytest shows it on failure

    def assert_nothing_left(self) -> None:
        """Each pod that was enrolled, and the node, are as they were before."""
        for pod, (before, devices) in self._before.items():
            added_since = set(pod.veths) - devices
            after = without_devices(kernel_state(pod), added_since)
            left = changes(before, after)
            assert left == [], left

    def __repr__(self) -> str:
        return f"<Mesh {self.run_dir}>"
