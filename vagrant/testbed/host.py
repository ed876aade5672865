"""What the test bed needs of the machine it runs on."""

from __future__ import annotations

import os
import shutil
import subprocess

from .checkout import ROOT
from .errors import BedError

_INSTALL = ROOT / "scripts/system-packages"


def require_root(what: str) -> None:
    """Raise BedError, unless root."""
    if os.geteuid() != 0:
        raise BedError(f"{what} needs root", "use sudo, or a PYAMBIENT_CACHE that root has filled")


def install(*packages: str) -> None:
    """Install those of these Debian packages that are missing, as `make` does."""
    done = subprocess.run(
        [_INSTALL, *packages],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stdout.strip().splitlines() or ["no word from apt-get"]
        raise BedError(
            f"cannot install {', '.join(packages)}: {said[-1]}", "connect this machine, or be root"
        )


def require(program: str, package: str) -> None:
    """See that `program` is on PATH, by installing `package` if need be."""
    if not shutil.which(program):
        install(package)
