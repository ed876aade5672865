"""Who in a pod could send past its guard: sockets whose packets never come to a tc hook.

A packet socket can ask for that (PACKET_QDISC_BYPASS), and the kernel tells nobody whether it did;
an AF_XDP socket always does so. Neither proves a leak: tcpdump and DHCP clients have packet sockets
as well. What they are good for is a name in the log, next to what the guard on the node counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyambient.netns import Netns

from .processes import holding

_NET: Final = Path("/proc/thread-self/net")
_MOST_SOCKETS: Final = 1024
_XDP: Final = "XDP"


@dataclass(frozen=True, slots=True)
class Observations:
    """The packet sockets of a pod, by inode, and how many AF_XDP sockets it has."""

    packet_sockets: frozenset[int]
    xdp_sockets: int


NOTHING: Final = Observations(frozenset(), 0)


def observations(netns: Netns) -> Observations:
    """What there is now; two small files, as both protocols count by namespace."""
    with netns.entered():
        sockets = _lines(_NET / "packet")
        protocols = _lines(_NET / "protocols")
    inodes = frozenset(int(words[-1]) for words in sockets[:_MOST_SOCKETS])
    counts = {words[0]: int(words[2]) for words in protocols}
    return Observations(inodes, counts.get(_XDP, 0))


def holders(netns: Netns, inodes: Collection[int]) -> Mapping[int, str]:
    """Which process of the pod has which of these sockets; none for what others hold."""
    return {inode: str(process) for process, inode in holding(netns, inodes)}


def _lines(path: Path) -> list[list[str]]:
    """The words of each line but the heading; nothing where this kernel lacks the file."""
    try:
        return [line.split() for line in path.read_text().splitlines()[1:]]
    except FileNotFoundError:
        return []
