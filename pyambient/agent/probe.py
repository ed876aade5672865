"""A short-lived process that connects from inside a pod and sees who answers.

`python -m pyambient.agent.probe NETNS-FD CGROUP FAMILY...` moves where the pod's apps live (the
cgroup before it makes a socket, then the network namespace), becomes nobody without capabilities
(root hides ways around the interception) and connects to an address that RFC 5737 and RFC 3849
reserve for documentation: nobody but an interceptor can answer. It prints a JSON object, a
reason or null for each family.

The proof is the kernel's: the other end of the connection is a socket in this same namespace.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Final

from pyambient.model.address import SocketAddress, from_sockaddr
from pyambient.model.numbers import OUTBOUND_PORT
from pyambient.netns import Netns

from .sockdiag import SocketDiagnosis

NOBODY: Final = 65534
TARGETS: Final = {
    "IPv4": (SocketAddress("192.0.2.1", 9), SocketAddress("127.0.0.1", OUTBOUND_PORT)),
    "IPv6": (SocketAddress("2001:db8::1", 9), SocketAddress("::1", OUTBOUND_PORT)),
}
_ATTEMPTS: Final = 3
_NO_LINGER: Final = struct.pack("ii", 1, 0)
_PATIENCE: Final = 0.5


def probe(family: str) -> str | None:
    """Connect by `family`; why the connection was not captured, or None if it was."""
    target, redirected = TARGETS[family]
    reason = "nothing was tried"
    for _ in range(_ATTEMPTS):
        reason = _try(target, redirected)
        if not reason:
            return None
    return reason


def _try(target: SocketAddress, redirected: SocketAddress) -> str:
    diagnosis = SocketDiagnosis()
    client = socket.socket(target.family, socket.SOCK_STREAM)
    with client, contextlib.closing(diagnosis):
        client.setblocking(False)
        # Closed by a reset: the proxy has nothing to finish for us, and no drain waits for it.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        code = client.connect_ex(target.sockaddr())
        if code not in (0, errno.EINPROGRESS):
            return f"connect to {target}: {os.strerror(code)}"
        own = from_sockaddr(client.getsockname())
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if diagnosis.connected(target, own) or diagnosis.connected(redirected, own):
                return ""
            if code := client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return f"the connection to {target} failed: {os.strerror(code)}"
            time.sleep(0.005)
    return f"the connection to {target} left the pod unseen"


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def main(arguments: list[str]) -> None:
    descriptor, cgroup, *families = arguments
    if cgroup:
        Path(cgroup, "cgroup.procs").write_text("0", encoding="ascii")
    with Netns(int(descriptor), "pod").entered():
        _become_nobody()
        sys.stdout.write(json.dumps({family: probe(family) for family in families}))
        sys.stdout.flush()
        # Nobody cannot return to the first namespace, and has nothing to do there.
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
