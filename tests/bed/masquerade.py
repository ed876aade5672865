"""A pod behind the node: what it sends reaches the others from the node's own address."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .network import Bed, BedPod, Network, command

_CHAIN = "chain post {{ type nat hook postrouting priority srcnat; {} saddr {} masquerade; }}"
_SOURCES = {"ip": "10.79.0.0/24", "ip6": "fd79::/64"}
_FORWARDING = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")


@contextlib.contextmanager
def masqueraded(bed: Bed) -> Iterator[BedPod]:
    """A pod in another network, which the node masquerades towards the bed's own."""
    network = bed.add_network(Network("br79", "10.79.0", "fd79::"))
    before = bed.node.command("sysctl", "-n", *_FORWARDING).split()
    _set_forwarding(bed, ["1", "1"])
    for family, source in _SOURCES.items():
        chain = _CHAIN.format(family, source)
        command("nft", "-f", "-", text=f"table {family} masquerading {{ {chain}; }}\n")
    try:
        yield bed.pod("masqueraded", network=network)
    finally:
        for family in _SOURCES:
            command("nft", "delete", "table", family, "masquerading")
        _set_forwarding(bed, before)


def _set_forwarding(bed: Bed, values: list[str]) -> None:
    settings = [f"{name}={value}" for name, value in zip(_FORWARDING, values, strict=True)]
    bed.node.command("sysctl", "-q", "-w", *settings)
