"""What an app tries to get of the proxy's traffic by having its ports.

With `bpf` and `tc`: there sk_lookup hands connections to the proxy's sockets themselves.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import INBOUND_PORT, OUTBOUND_PORT
from tests.bed import Channel, apps

from .conftest import Pair

_CONNECTIONS = 40


def _share(channel: Channel, ports: Sequence[int], *, at_once: bool) -> int:
    """Root's sockets on these ports that let others share them; how many connections they got.

    They listen when told to, or at once.
    """
    shared = []
    for port in ports:
        made = socket.socket(socket.AF_INET6)
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            made.setsockopt(socket.SOL_SOCKET, option, 1)
        made.bind(("::", port))
        made.setblocking(False)
        shared.append(made)
    if not at_once:
        channel.send("bound")
        channel.receive()
    for made in shared:
        made.listen()
    channel.send("listening")
    channel.receive()
    got = 0
    for made in shared:
        try:
            made.accept()
        except BlockingIOError:
            continue
        got += 1
    return got


def _assert_all_reach_the_proxy(pair: Pair, family: str) -> None:
    there = SocketAddress(pair.server.address(family), 8090)
    with pair.serve(pair.server, 8090):
        for pod in (pair.client, pair.outside):
            for _ in range(_CONNECTIONS):
                assert pod.run(apps.request, there).data == b"hello"


@pytest.mark.parametrize("backend", ["bpf", "tc"])
def test_root_shares_a_port_that_it_bound_before(strangers: Pair, family: str) -> None:
    """It binds before the enrolment, when nobody sees that, and listens after it."""
    ports = (OUTBOUND_PORT, INBOUND_PORT)
    sharing = [
        pod.spawn(_share, ports, at_once=False, uid=0, gid=0)
        for pod in (strangers.client, strangers.server)
    ]
    assert [one.receive() for one in sharing] == ["bound", "bound"]
    strangers.enroll()
    assert [one.ask("listen") for one in sharing] == ["listening", "listening"]
    _assert_all_reach_the_proxy(strangers, family)
    for one in sharing:
        one.send("stop")
        assert one.wait() == 0


@pytest.mark.parametrize("backend", ["tc"])
def test_root_shares_a_port_later(strangers: Pair, family: str) -> None:
    """No hook sees bind() with `tc`."""
    strangers.enroll()
    ports = (OUTBOUND_PORT, INBOUND_PORT)
    sharing = [
        pod.spawn(_share, ports, at_once=True, uid=0, gid=0)
        for pod in (strangers.client, strangers.server)
    ]
    assert [one.receive() for one in sharing] == ["listening", "listening"]
    _assert_all_reach_the_proxy(strangers, family)
    for one in sharing:
        one.send("stop")
        assert one.wait() == 0
