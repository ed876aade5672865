"""A short-lived process that connects in a network namespace, and is refused.

`python -m pyambient.intercept.magic_connect NETNS-FD CGROUP` moves to the cgroup before it makes
its socket: that is the cgroup whose hooks the socket will meet. See `netns_cookie`.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path

from pyambient.netns import Netns


def main(descriptor: str, cgroup: str) -> None:
    Path(cgroup, "cgroup.procs").write_text("0", encoding="ascii")
    netns = Netns(int(descriptor), "pod")
    # UDP: should nobody refuse, still nothing is sent. The hook comes before the routing table.
    with (
        netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as question,
        contextlib.suppress(OSError),
    ):
        question.connect(("127.0.0.1", 9))


if __name__ == "__main__":
    main(*sys.argv[1:])
