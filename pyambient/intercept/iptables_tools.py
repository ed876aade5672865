"""The programs of iptables, run inside a pod.

A child process starts in the network namespace of the thread that made it, so it is made inside
`Netns.entered()` and waited for outside.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from pyambient.errors import PyambientError, UnsupportedFeature
from pyambient.netns import Netns

from .nf_tables import NFPROTO_IPV4, chains, tables

# `-w` waits for the lock of iptables-legacy, which a busy node can hold for seconds.
_TIMEOUT: Final = 30.0
_PATH: Final = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_INSTALL: Final = "install it with 'apt install iptables', or use --backend bpf"


def tool(action: str, variant: str, *, ipv6: bool) -> str:
    """The name of a program, such as `ip6tables-nft-restore`."""
    return "-".join(filter(None, (f"ip{'6' * ipv6}tables", variant, action)))


def run(netns: Netns, program: str, *arguments: str, text: str = "") -> str:
    """Run a program in the pod with `text` as its input; its output.

    PyambientError is the first line of what it complained of.
    """
    try:
        with netns.entered():
            process = subprocess.Popen(
                [program, *arguments],
                env={"PATH": _PATH, "LC_ALL": "C"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
    except FileNotFoundError:
        raise PyambientError(f"there is no {program}", _INSTALL) from None
    with process:
        try:
            output, complaint = process.communicate(text, timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise PyambientError(
                f"{program} did not end within {_TIMEOUT:.0f} s",
                "see who holds /run/xtables.lock, with 'fuser -v /run/xtables.lock'",
            ) from None
    if process.returncode:
        raise PyambientError(next(filter(None, complaint.splitlines()), f"{program} failed"))
    return output


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
        raise PyambientError("there is no iptables-restore", _INSTALL)
    ours_are_nft = "nft" in usable and any(
        chain.name.startswith("ISTIO_") for chain in chains(netns, NFPROTO_IPV4)
    )
    if "legacy" in usable and legacy_tables(netns, ipv6=False) and not ours_are_nft:
        return "legacy"
    return usable[0]


def _have(variant: str) -> bool:
    return shutil.which(tool("restore", variant, ipv6=False), path=_PATH) is not None


def _nft_works(netns: Netns) -> bool:
    try:
        tables(netns, NFPROTO_IPV4)
    except UnsupportedFeature:
        return False
    return True
