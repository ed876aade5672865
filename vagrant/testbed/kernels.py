"""The kernels by the names that `vagrant/run` takes, and what is expected of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import nobpf
from .guest import SERIES, guest
from .machine import Boot

NOBPF = "nobpf"
NAMES = (*SERIES, NOBPF)
# (kernel, backend) that is not there, and has to say so.
NOT_EXPECTED = frozenset({(NOBPF, "bpf"), (NOBPF, "tc")})


def boot(name: str) -> Boot:
    """What qemu needs for one of NAMES; built first where it is missing."""
    return Boot(name, kernel(name), None if name == NOBPF else initrd(name), guest().image)


def kernel(name: str) -> Path:
    """The kernel's file; built first where it is missing."""
    return nobpf.kernel() if name == NOBPF else guest().kernel(name)


def initrd(name: str) -> Path:
    """The initrd's file, for all but NOBPF."""
    return guest().initrd(name)


def build(names: Sequence[str]) -> None:
    """Build all that these need, one after the other."""
    for name in names:
        boot(name)
