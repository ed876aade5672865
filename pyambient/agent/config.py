"""Where the agent keeps its state, and the settings it runs with."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyambient.errors import PyambientError, UsageError
from pyambient.intercept.interface import Site

DEFAULT_RUN_DIR: Final = Path("/run/pyambient")
DEFAULT_BPFFS: Final = Path("/sys/fs/bpf/pyambient")
DEFAULT_DRAIN_TIMEOUT: Final = 30.0
MAX_DRAIN_TIMEOUT: Final = 86400.0
# sun_path holds 108 bytes and a closing zero; our longest socket name is /details.sock.
_LONGEST_RUN_DIR: Final = 107 - len("/details.sock")


@dataclass(frozen=True, slots=True)
class RunDir:
    """The directory that agent, proxy and command line share."""

    path: Path

    @property
    def pods(self) -> Path:
        return self.path / "pods"

    @property
    def zds_socket(self) -> Path:
        return self.path / "zds.sock"

    @property
    def details_socket(self) -> Path:
        return self.path / "details.sock"

    @property
    def agent_socket(self) -> Path:
        return self.path / "agent.sock"

    def enrolled(self) -> int:
        """How many pods have a record."""
        return len(list(self.pods.glob("*.json")))

    def farewell(self, who: str) -> str:
        """What to tell a user when `who` stops: how many pods stay, and how to free them."""
        count = self.enrolled()
        if not count:
            return f"{who} has stopped; no pod is enrolled"
        where = "" if self.path == DEFAULT_RUN_DIR else f" --run-dir {self.path}"
        return (
            f"{who} has stopped; pods that stay enrolled: {count}; without a proxy their"
            f" connections are refused; free them with: pyambient{where} unenroll --all"
        )

    def prepare(self) -> None:
        """Make it and what is in it, for root alone; an error if others could write there.

        Whoever can write here could hand the agent another pod's record, so a directory that is
        not root's own is refused, not repaired.
        """
        if len(os.fsencode(self.path.absolute())) > _LONGEST_RUN_DIR:
            raise UsageError(
                f"--run-dir {self.path} is too long for a unix socket",
                f"use a path of at most {_LONGEST_RUN_DIR} bytes",
            )
        for directory in (self.path, self.pods):
            _make_private(directory)


def _make_private(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        raise PyambientError(
            f"{directory} cannot be made: {error.strerror}", "choose another --run-dir"
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PyambientError(
            f"{directory} is not a directory of root's own", "choose another --run-dir"
        )
    directory.chmod(0o700)


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What `pyambient agent` was asked for; times are in seconds."""

    run_dir: RunDir = RunDir(DEFAULT_RUN_DIR)
    cgroup: Path | None = None
    bpffs: Path = DEFAULT_BPFFS
    drain_timeout: float = DEFAULT_DRAIN_TIMEOUT
    proxy_timeout: float = 10.0
    round_pause: float = 5.0
    bpf_loader: str = "libbpf"
    probe_cgroup: Path | None = None

    @property
    def site(self) -> Site:
        return Site(self.run_dir.path, self.bpffs, self.cgroup, self.probe_cgroup)
