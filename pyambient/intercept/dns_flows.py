"""UDP flows to resolvers that conntrack knew before the redirects came, or knows when they go.

Netfilter consults nat rules for the first packet of a flow alone. An app that asks on and on from
one port would therefore never be captured, or never be let go again: its flow has to be forgotten.
"""

from __future__ import annotations

import errno
import socket
from typing import Final

from pyambient.errors import UnsupportedFeature
from pyambient.model.numbers import RESOLVER_PORT

from .ctnetlink import Conntrack
from .interface import Pod

# What it does, in the words of a tool that is not needed for it.
FORGETTING: Final = f"# conntrack -D -p udp --orig-port-dst {RESOLVER_PORT}"
_ABSENT: Final = frozenset({errno.EINVAL, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT})


def forget_dns_flows(pod: Pod, *, captures: bool) -> None:
    """Let the rules decide anew about every flow to a resolver.

    Where DNS is captured the proxy needs ctnetlink, too: UnsupportedFeature if the kernel has none.
    """
    try:
        with Conntrack(pod.netns) as conntrack:
            for family in (socket.AF_INET, socket.AF_INET6):
                for opening, _ in conntrack.entries(family):
                    if opening.destination.port == RESOLVER_PORT:
                        conntrack.forget(opening)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        if captures:
            instead = "enrol without DNS capture, or use --backend bpf"
            raise UnsupportedFeature("ctnetlink", "2.6.14", instead) from None
