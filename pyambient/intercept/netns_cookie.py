"""The cookie of a network namespace, on kernels that have no system call for it as well.

General theory of operation
---------------------------
BPF maps are keyed by the cookie. SO_NETNS_COOKIE tells it since Linux 5.14. Before, a connect
hook is the first that can (bpf_get_netns_cookie(), 5.7), so one is asked: it is linked to a cgroup
made for the moment, a child process goes there, makes a socket in the namespace and connects it.
The hook notes the cookie and refuses; nothing is sent.

A process of its own, because a hook follows the cgroup that its socket was made in, and moving
ourselves would move every thread. As that costs the start of an interpreter, the answer is kept
for as long as the handle on the namespace lives.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Final
from weakref import WeakKeyDictionary

from pyambient.children import module
from pyambient.errors import PyambientError, UnsupportedFeature
from pyambient.netns import Netns

from .kernel_objects import AttachType
from .loader import load
from .scratch_cgroup import scratch_cgroup

_PATIENCE: Final = 20.0
_ONLY: Final = struct.pack("=I", 0)
_known: WeakKeyDictionary[Netns, int] = WeakKeyDictionary()


def netns_cookie(netns: Netns, cgroup: Path | None) -> int:
    """The cookie; `cgroup` is where a cgroup can be made to ask from, should that be needed."""
    try:
        return netns.cookie()
    except UnsupportedFeature:
        if netns not in _known:
            _known[netns] = ask_by_connect(netns, cgroup)
        return _known[netns]


def ask_by_connect(netns: Netns, cgroup: Path | None) -> int:
    """The cookie, told by a hook (Linux 5.7)."""
    with scratch_cgroup(cgroup) as place, load("cookie") as asked:
        with place.link(asked.program_fd("pyamb_cookie"), AttachType.CONNECT4):
            _connect(netns, place.path)
        with asked.maps()["cookies"] as cookies:
            answer = cookies.get(_ONLY)
    if answer is None:
        raise PyambientError(f"no BPF program runs for sockets of {place.path}")
    return int(struct.unpack("=Q", answer)[0])


def _connect(netns: Netns, cgroup: Path) -> None:
    command = module(f"{__package__}.magic_connect", str(netns.fd), str(cgroup))
    try:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            pass_fds=(netns.fd,),
        )
    except subprocess.TimeoutExpired:
        raise PyambientError(f"asking for the cookie of {netns.name} does not end") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().rpartition("\n")[2]
        raise PyambientError(f"asking for the cookie of {netns.name} failed: {reason}") from None
