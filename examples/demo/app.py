"""The application in the server's pod, as seen from outside: its process and what it reported."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Self

from pyambient.errors import PyambientError

from .bed import Pod
from .patience import patience

PORT = 8080
_PATIENCE = patience(5.0)
# Debian's: nobody may not read a virtual environment below /root.
_PYTHON = "/usr/bin/python3"


class App:
    """A running `greeter.py` in `pod`."""

    def __init__(self, pod: Pod, work: Path) -> None:
        """Start it; returns when it listens."""
        script = work / "greeter.py"
        shutil.copyfile(Path(__file__).with_name("greeter.py"), script)
        self._log = work / "greeter.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                pod.command(_PYTHON, str(script), str(PORT)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + _PATIENCE
        while "listening" not in self._log.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise PyambientError(f"the HTTP server did not start: {self._log.read_text()}")
            time.sleep(0.02)

    def accepted(self) -> list[str]:
        """The client address of every connection so far."""
        lines = self._log.read_text().splitlines()
        return [line.split()[1] for line in lines if line.startswith("accepted ")]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def __repr__(self) -> str:
        return f"<App pid {self._process.pid}, {len(self.accepted())} connections>"
