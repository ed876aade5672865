"""Who may change the enrolments of a run directory: one process at a time."""

from __future__ import annotations

import fcntl
import os

from pyambient.errors import PyambientError

from .config import RunDir


class AgentLock:
    """Held by the agent, or by a command that does an agent's work where there is none."""

    def __init__(self, run_dir: RunDir) -> None:
        self._path = run_dir.path / "agent.lock"

    def __enter__(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._path, flags, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise PyambientError(
                f"another pyambient agent works in {self._path.parent}",
                "stop it, or choose another --run-dir",
            ) from None

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def __repr__(self) -> str:
        return f"<AgentLock {self._path}>"
