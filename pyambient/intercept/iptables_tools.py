"""Which programs of iptables suit a pod."""

from __future__ import annotations

from pathlib import Path

from pyambient.errors import UnsupportedFeature
from pyambient.netns import Netns

from .nf_tables import NFPROTO_IPV4, chains, tables
from .programs import installed, not_installed


def tool(action: str, variant: str, *, ipv6: bool) -> str:
    """The name of a program, such as `ip6tables-nft-restore`."""
    return "-".join(filter(None, (f"ip{'6' * ipv6}tables", variant, action)))


def legacy_tables(netns: Netns, *, ipv6: bool) -> list[str]:
    """The tables of iptables-legacy that are alive in the pod."""
    # Not /proc/net, which shows the namespace of the process's first thread.
    path = Path(f"/proc/thread-self/net/ip{'6' * ipv6}_tables_names")
    with netns.entered():
        try:
            return path.read_text("ascii").split()
        except FileNotFoundError:
            return []


def choose_variant(netns: Netns) -> str:
    """Which iptables suits the pod: the one its rules are in (ours first), else nft, else legacy.

    "" is an iptables from before there were two. Rules of both kinds would work side by side, but
    in an order that nobody chose.
    """
    usable = [v for v in ("nft", "legacy", "") if _have(v) and (v != "nft" or _nft_works(netns))]
    if not usable:
        raise not_installed("iptables-restore")
    ours_are_nft = "nft" in usable and any(
        chain.name.startswith("ISTIO_") for chain in chains(netns, NFPROTO_IPV4)
    )
    if "legacy" in usable and legacy_tables(netns, ipv6=False) and not ours_are_nft:
        return "legacy"
    return usable[0]


def _have(variant: str) -> bool:
    return installed(tool("restore", variant, ipv6=False))


def _nft_works(netns: Netns) -> bool:
    try:
        tables(netns, NFPROTO_IPV4)
    except UnsupportedFeature:
        return False
    return True
