"""DNS of what is behind an enrolled pod: its answers go on by a link that takes less than lo."""

from __future__ import annotations

import pytest

from pyambient.model.address import SocketAddress
from tests.bed import Bed, Network
from tests.dns import build

from . import resolver
from .conftest import Pair
from .resolver import Answered

pytestmark = pytest.mark.parametrize("backend", ["tc"], scope="module")

_LONG_NAME = "long.example.com"


def test_an_answer_longer_than_the_link(bed: Bed, strangers: Pair, family: str) -> None:
    """By IPv4 it comes in fragments, by IPv6 truncated; then the client asks by TCP (RFC 6891)."""
    client, outside = strangers.client, strangers.outside
    behind = bed.add_network(Network("br-in", "10.99.0", "fd99::", node_is_router=False))
    ipv4, ipv6 = bed.add_device(client, "eth1", behind)
    inner = bed.pod("inner", network=behind)
    client.command("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    inner.ip(f"route add default via {ipv4}", f"route add ::/0 via {ipv6}")
    strangers.enroll()
    query = build.query(text=_LONG_NAME, edns=4096)
    whole = build.answer_to(query, padding=resolver.LONG)
    address = SocketAddress(outside.address(family), resolver.PORT)
    with outside.spawn(resolver.resolver, uid=0, gid=0) as server:
        assert server.receive() == "listening"
        (answer,) = inner.run(resolver.ask, address, query)
        if family == "v4":
            assert answer == Answered(whole, address)
        else:
            assert (answer.sender, bool(answer.message[2] & 2)) == (address, True)
        assert inner.run(resolver.ask_over_tcp, address, query) == [whole]
