"""What the tests of the leak guard ask the mesh and the wire."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from tests.bed import BedPod, Mesh, capturing

MARKER = b"plaintext that must not be on the wire"


def guard_of(mesh: Mesh, pod: BedPod) -> dict[str, Any]:
    """What `status` says of the pod's guard."""
    (found,) = [p for p in mesh.status()["pods"] if p["netns"] == pod.name]
    return dict(found["guard"])


def log_lines(mesh: Mesh, pod: BedPod, scope: str) -> list[Mapping[str, Any]]:
    return [
        line
        for line in mesh.lines()
        if line.get("scope") == scope and line.get("pod") == f"default/{pod.name}"
    ]


@contextlib.contextmanager
def nothing_arrives(pod: BedPod) -> Iterator[None]:
    """The marker is on no wire that leads to `pod`."""
    with capturing(pod) as capture:
        yield
    assert not any(MARKER in frame for frame in capture.frames)
