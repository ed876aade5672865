"""Ports that an app listens on are its own, whatever addresses the proxy's sockets have."""

from __future__ import annotations

import errno
import socket

from pyambient.model.address import SocketAddress
from tests.bed import apps

from .conftest import Pair


def test_an_app_listens_on_the_port_of_its_peer(pair: Pair, family: str) -> None:
    """What the proxy accepted of a pod's connection has the peer's address as its own."""
    there = SocketAddress(pair.server.address(family), 8086)
    back = SocketAddress(pair.client.address(family), 8086)
    with pair.serve(pair.server, 8086), pair.client.spawn(apps.hold, there, 1) as held:
        assert held.receive() == {}
        with pair.serve(pair.client, 8086):
            assert pair.server.run(apps.request, back).data == b"hello"
        assert held.ask("ping") == {}


def test_an_app_is_started_again_while_it_has_clients(pair: Pair, family: str) -> None:
    """Killed with a client connected, it listens on its port at once, and is reached."""
    there = SocketAddress(pair.server.address(family), 8087)
    first = pair.serve(pair.server, 8087)
    with pair.client.spawn(apps.hold, there, 1) as held:
        assert held.receive() == {}
        first.kill()
        with pair.serve(pair.server, 8087):
            assert pair.client.run(apps.request, there).data == b"hello"


def _bind(port: int, shared: int) -> int:
    with socket.socket(socket.AF_INET6) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, shared)
        try:
            made.bind(("::", port))
        except OSError as error:
            return error.errno or errno.EIO
    return 0


def test_an_app_that_shares_no_address_has_to_wait(pair: Pair, family: str) -> None:
    """Where the accepted socket has the peer's address, both must have SO_REUSEADDR: a limit."""
    there = SocketAddress(pair.server.address(family), 8088)
    with pair.serve(pair.server, 8088), pair.client.spawn(apps.hold, there, 1) as held:
        assert held.receive() == {}
        taken = errno.EADDRINUSE if pair.backend in ("bpf", "tc") else 0
        assert [pair.client.run(_bind, 8088, shared) for shared in (1, 0)] == [0, taken]
