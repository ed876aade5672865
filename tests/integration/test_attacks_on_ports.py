"""What an app tries to get of the proxy's traffic by having its ports.

With `bpf` and `tc`: there sk_lookup hands connections to the proxy's sockets themselves.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

import pytest

from pyambient.intercept.original_dns import DNS_SLOT_COUNT
from pyambient.model.address import SocketAddress, from_sockaddr
from pyambient.model.numbers import DNS_PORT, INBOUND_PORT, OUTBOUND_PORT, RESERVED_PORTS
from tests.bed import Capability, Channel, ClientOptions, apps
from tests.dns import build

from .conftest import Pair
from .test_dns_lifecycle import resolver_of, serve

_CONNECTIONS = 40
_FIRST_SLOT = int.from_bytes(socket.inet_aton("127.53.0.0"))


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
    assert [pod["ports"]["outbound"] for pod in strangers.mesh.status()["pods"]] == [15001, 15001]
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


def _bind_each(ports: Sequence[int], mark: int) -> list[int]:
    """The errno of each, 0 for a port that could be bound; TCP before UDP."""
    results = []
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        for port in ports:
            with socket.socket(socket.AF_INET6, kind) as made:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                try:
                    made.bind(("::", port))
                except OSError as error:
                    results.append(error.errno or errno.EIO)
                else:
                    results.append(0)
    return results


@pytest.mark.parametrize("backend", ["bpf"])
def test_what_stands_for_a_port_is_the_proxys(strangers: Pair) -> None:
    """No app binds it, proxy there or not; the one that it stands for is anybody's again."""
    moved, own = (15101, 15153), (OUTBOUND_PORT, DNS_PORT)
    taken = [strangers.serve(strangers.client, port) for port in own]
    strangers.enroll()
    for server in taken:
        server.kill()
    bind = strangers.client.run
    capable = {"capabilities": (Capability.NET_RAW, Capability.NET_ADMIN)}
    for _ in range(2):
        for who in (capable, {"uid": 0, "gid": 0}):
            assert bind(_bind_each, moved, 0x539, **who) == [errno.EPERM] * 4
            assert bind(_bind_each, own, 0x539, **who) == [0] * 4
        strangers.mesh.kill()
    strangers.mesh.start()
    for port in own:
        strangers.serve(strangers.client, port)


def _be_forged(channel: Channel, address: SocketAddress) -> list[SocketAddress]:
    """Ask once, then say who sent what comes."""
    with ClientOptions(timeout=20).socket(address, socket.SOCK_DGRAM) as client:
        client.sendto(build.query(), address.sockaddr())
        _, sender = client.recvfrom(4096)
        channel.send(client.getsockname()[1])
        senders = [from_sockaddr(sender)]
        channel.receive()
        client.setblocking(False)
        while True:
            try:
                senders.append(from_sockaddr(client.recvfrom(4096)[1]))
            except BlockingIOError:
                return senders


def _forge(port: int) -> None:
    """Send from the address of each slot, by the port that was the proxy's."""
    for number in range(DNS_SLOT_COUNT):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as forger:
            forger.bind((socket.inet_ntoa((_FIRST_SLOT + number).to_bytes(4)), DNS_PORT))
            forger.sendto(b"forged", ("127.0.0.1", port))


@pytest.mark.parametrize("backend", ["bpf"])
def test_answers_from_the_port_that_was_the_proxys_are_nobodys(strangers: Pair) -> None:
    """Apps may have 15053 in a pod where another port stands for it, and the slots' addresses."""
    address = resolver_of(strangers, "v4")
    strangers.serve(strangers.client, DNS_PORT)
    with serve(strangers):
        strangers.enroll()
        victim = strangers.client.spawn(_be_forged, address)
        strangers.client.run(_forge, victim.receive())
        victim.send("look")
        senders = victim.wait()
    assert senders[0] == address
    assert len(senders) > 1
    assert {sender.port for sender in senders[1:]} == {DNS_PORT}


@pytest.mark.parametrize("backend", ["bpf", "tc", "nftables", "iptables"])
def test_un_enrolled_every_port_is_anybodys(strangers: Pair) -> None:
    """With bpf the hook on bind() leaves the pod alone, for the ports of both kinds."""
    with strangers.serve(strangers.client, OUTBOUND_PORT):
        strangers.enroll()
    strangers.mesh.unenroll(strangers.client)
    ports = (15101, *RESERVED_PORTS)
    assert strangers.client.run(_bind_each, ports, 0, uid=0, gid=0) == [0] * 10
    strangers.serve(strangers.client, OUTBOUND_PORT)
