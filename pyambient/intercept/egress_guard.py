"""The guard on a pod's devices: nothing of a captured socket leaves the pod in plain text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from .bpf_node import existing_map
from .device_program import DeviceProgram, Direction, Place
from .interface import Pod, step
from .loader import Constants, LoadedObject, load

_MAP: Final = "captured_socks"


@step
@dataclass(frozen=True, slots=True)
class EgressGuard(DeviceProgram):
    """The guard on one device. What is redirected by a program ahead of it never comes here."""

    kind: ClassVar[str] = "bpf-guard"
    place: ClassVar[Place] = Place("pyamb_guard", Direction.EGRESS, rank=2)

    @contextlib.contextmanager
    def load(self, pod: Pod) -> Iterator[LoadedObject]:  # noqa: ARG002 - it serves every pod alike
        shared = existing_map(Path(self.bpffs), _MAP)
        with shared, load("guard", Constants(), {_MAP: shared}) as loaded:
            yield loaded
