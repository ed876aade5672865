"""Programs of the node, run inside a pod.

A child process starts in the network namespace of the thread that made it, so it is made inside
`Netns.entered()` and waited for outside.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Final

from pyambient.errors import PyambientError
from pyambient.netns import Netns

# `-w` waits for the lock of iptables-legacy, which a busy node can hold for seconds.
_TIMEOUT: Final = 30.0
_PATH: Final = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def installed(program: str) -> bool:
    return shutil.which(program, path=_PATH) is not None


def not_installed(program: str) -> PyambientError:
    """The error for a node without this program: it says what to install."""
    package, instead = ("nftables", "iptables") if program == "nft" else ("iptables", "bpf")
    return PyambientError(
        f"there is no {program}",
        f"install it with 'apt install {package}', or use --backend {instead}",
    )


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
        raise not_installed(program) from None
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
