"""pyambient as its users have it: `pyambient up` in the foreground, everything else by the CLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from pyambient.errors import PyambientError

from .bed import Pod
from .patience import patience

_PATIENCE = patience(10.0)
_PYAMBIENT = str(Path(sys.executable).with_name("pyambient"))
NAMESPACE = "demo"


class Mesh:
    """A running `pyambient up` whose whole state is in `work`."""

    def __init__(self, work: Path, cgroup: Path, mesh_file: Path) -> None:
        self._run_dir = work / "run"
        self._log = work / "up.log"
        options = {
            "--run-dir": self._run_dir,
            "--cgroup": cgroup,
            "--mesh": mesh_file,
            "--ca-dir": work / "ca",
            "--log-format": "json",
        }
        arguments = [str(word) for option in options.items() for word in option]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [_PYAMBIENT, "up", *arguments],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait_until_ready()

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a pyambient command against this `up`; output and errors in `stdout`."""
        return subprocess.run(
            [_PYAMBIENT, arguments[0], "--run-dir", str(self._run_dir), *arguments[1:]],
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def succeed(self, *arguments: str) -> str:
        """Run a command that must exit 0; what it printed."""
        done = self.call(*arguments)
        if done.returncode:
            raise PyambientError(
                f"'pyambient {' '.join(arguments)}' exited {done.returncode}: {done.stdout.strip()}"
            )
        return done.stdout

    def enrol(self, pod: Pod, backend: str) -> str:
        account = ("--namespace", NAMESPACE, "--service-account", pod.name)
        return self.succeed("enroll", pod.name, *account, "--backend", backend)

    def access_log(self, **wanted: str) -> list[dict[str, Any]]:
        """Access-log lines whose fields have the wanted values (`src_addr` is `src.addr`)."""
        fields = {name.replace("_", ".", 1): value for name, value in wanted.items()}
        return [
            line
            for line in map(_parsed, self._log.read_text().splitlines())
            if line.get("scope") == "access"
            and all(str(line.get(name, "")).startswith(value) for name, value in fields.items())
        ]

    def wait_for_log(self, count: int, **wanted: str) -> list[dict[str, Any]]:
        """The lines of `access_log` once there are `count` of them, or what there is by then."""
        deadline = time.monotonic() + _PATIENCE
        while len(lines := self.access_log(**wanted)) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        return lines

    def stop(self) -> int:
        """End `up` as Ctrl-C or systemd would; its exit code."""
        self._process.terminate()
        return self._process.wait(timeout=_PATIENCE)

    def last_words(self) -> str:
        return "\n".join(self._log.read_text().splitlines()[-20:])

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while "pyambient is ready" not in self._log.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise PyambientError(f"'pyambient up' did not start: {self.last_words()}")
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def __repr__(self) -> str:
        return f"<Mesh pid {self._process.pid} in {self._run_dir}>"


def _environment() -> dict[str, str]:
    """Ours without what would set options of pyambient's (PYAMBIENT_...)."""
    return {name: v for name, v in os.environ.items() if not name.startswith("PYAMBIENT_")}


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
