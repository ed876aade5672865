"""Many pods on one node: a veth pair each to a pod in the middle, IPv4 and IPv6."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pyambient.bench.pods import ip, make_pod
from pyambient.netns import Netns


class Crowd:
    """Pods that nobody has enrolled yet; `grow` makes more of them."""

    def __init__(self) -> None:
        self.pods: list[Netns] = []
        self._middle = make_pod("middle")

    def grow(self, count: int) -> Iterator[Netns]:
        """Make pods until there are `count`; those that were added."""
        for number in range(len(self.pods), count):
            pod = make_pod(f"crowd-{number}")
            self.pods.append(pod)
            self._join(pod, number)
            yield pod

    def _join(self, pod: Netns, number: int) -> None:
        middle = f"/proc/{os.getpid()}/fd/{self._middle.fd}"
        high, low = divmod(number + 2, 256)
        ip(
            pod,
            f"link add eth0 type veth peer name veth{number} netns {middle}",
            f"address add 10.98.{high}.{low}/16 dev eth0",
            f"address add fd98::{number + 2:x}/64 dev eth0 nodad",
            "link set eth0 up",
        )
        ip(self._middle, f"link set veth{number} up")

    def close(self) -> None:
        for pod in (*self.pods, self._middle):
            pod.close()

    def __repr__(self) -> str:
        return f"<Crowd of {len(self.pods)}>"
