"""A short-lived process that connects from inside a pod and sees who answers.

`python -m pyambient.agent.probe NETNS-FD CGROUP PORTS TRIAL...` moves where the pod's apps live
(the cgroup before it makes a socket, then the network namespace), becomes nobody without
capabilities (root hides ways around the interception) and makes each TRIAL, as in "TCP/IPv4",
towards an address that is reserved for documentation. PORTS are the proxy's, with commas between
them. It prints a JSON object, a reason or null for each.

The proof is the kernel's: the other end of a connection is a socket in this same namespace, and a
query was answered although no device has sent it.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Final

from pyambient.intercept.socket_diag import is_connected
from pyambient.model.address import SocketAddress, from_sockaddr
from pyambient.model.ports import Ports
from pyambient.netns import Netns

from .departures import TARGETS, Departures
from .probe_dns import ask_by_tcp, ask_by_udp, redirected_to

NOBODY: Final = 65534
_ATTEMPTS: Final = 3
_NO_LINGER: Final = struct.pack("ii", 1, 0)
_PATIENCE: Final = 0.5


def connect(target: SocketAddress, ports: Ports) -> str:
    """Open a connection; why it was not captured, empty if it was."""
    with socket.socket(target.family, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        # Closed by a reset: the proxy has nothing to finish for us, and no drain waits for it.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        code = client.connect_ex(target.sockaddr())
        if code not in (0, errno.EINPROGRESS):
            return f"connect to {target}: {os.strerror(code)}"
        own = from_sockaddr(client.getsockname())
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            ends = (target, redirected_to(target, ports.outbound))
            if any(is_connected(end, own) for end in ends):
                return ""
            if code := client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return f"the connection to {target} failed: {os.strerror(code)}"
            time.sleep(0.005)
    return f"the connection to {target} left the pod unseen"


_TRIALS: Final = {"TCP": connect, "DNS over UDP": ask_by_udp, "DNS over TCP": ask_by_tcp}


def make(trial: str, ports: Ports, departures: Departures) -> str | None:
    """Make a trial, more than once if it fails; why it was not captured, or None if it was."""
    kind, _, family = trial.partition("/")
    target = TARGETS[family]
    reason = "nothing was tried"
    for _ in range(_ATTEMPTS):
        departures.device()
        reason = _TRIALS[kind](target, ports)
        if device := departures.device():
            return f"the query to {target.ip} left the pod by {device}"
        if not reason:
            return None
    return reason


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def main(arguments: list[str]) -> None:
    descriptor, cgroup, numbers, *trials = arguments
    ports = Ports(*map(int, numbers.split(",")))
    if cgroup:
        Path(cgroup, "cgroup.procs").write_text("0", encoding="ascii")
    with Netns(int(descriptor), "pod").entered(), Departures() as departures:
        _become_nobody()
        sys.stdout.write(json.dumps({trial: make(trial, ports, departures) for trial in trials}))
        sys.stdout.flush()
        # Nobody cannot return to the first namespace, and has nothing to do there.
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
