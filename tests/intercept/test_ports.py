"""Which ports the proxy gets in a pod whose apps have some of its own."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from pyambient.errors import PyambientError
from pyambient.intercept.holders import holders
from pyambient.intercept.ports import choose_ports
from pyambient.model.ports import WELL_KNOWN, Ports
from pyambient.netns import Netns
from pyambient.proxy import sockets
from pyambient.proxy.dns.sockets import datagram_listener
from tests.bed import Bed, BedPod, Channel, Child, kernel_state

_TCP, _UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM


def _listen(
    channel: Channel, kind: int, host: str, port: int, option: int = socket.SO_REUSEADDR
) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as taken:
        if kind == _TCP or option == socket.SO_REUSEPORT:
            taken.setsockopt(socket.SOL_SOCKET, option, 1)
        if family == socket.AF_INET6:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind((host, port))
        if kind == _TCP:
            taken.listen()
        channel.send("listening")
        channel.receive()


def _start(pod: BedPod, main: Callable[..., None], *arguments: object, uid: int = 65534) -> Child:
    started = pod.spawn(main, *arguments, uid=uid, gid=uid)
    assert started.receive()
    return started


@contextlib.contextmanager
def _proxy(netns: Netns, ports: Ports) -> Iterator[None]:
    """The sockets that the proxy makes: what is chosen must be good for them."""
    with contextlib.ExitStack() as stack:
        for port in ports:
            stack.enter_context(sockets.listener(netns, port, netfilter=False))
        stack.enter_context(datagram_listener(netns, "bpf", ports.dns))
        yield


def _chosen(pod: BedPod, **how: bool) -> Ports:
    """What is chosen, once the proxy has shown that it can have it."""
    ports = choose_ports(pod.netns, **how)
    with _proxy(pod.netns, ports):
        pass
    return ports


def test_a_pod_where_nobody_has_one(bed: Bed) -> None:
    """The well-known ones, with IPv6 or without; the pod is untouched."""
    pods = bed.pod("a"), bed.pod("b", ipv6=False)
    before = kernel_state(*pods)
    assert [_chosen(pod) for pod in pods] == [WELL_KNOWN, WELL_KNOWN]
    assert kernel_state(*pods) == before


@pytest.mark.parametrize(
    ("kind", "host", "port"),
    [
        (_TCP, "127.0.0.1", 15001),
        (_TCP, "0.0.0.0", 15006),
        (_TCP, "::", 15008),
        (_TCP, "::1", 15053),
        (_UDP, "127.0.0.1", 15053),
        (_UDP, "::", 15053),
    ],
)
@pytest.mark.parametrize("option", [socket.SO_REUSEADDR, socket.SO_REUSEPORT])
def test_a_listener(bed: Bed, kind: int, host: str, port: int, option: int) -> None:
    """On any address of either family; root, who could share the port with the proxy, as well."""
    pod = bed.pod("a")
    taken = _start(pod, _listen, kind, host, port, option, uid=0)
    assert _chosen(pod).moved == {port: port + 100}
    assert holders(pod.netns, port).startswith(f"{taken.pid} (")


def test_all_of_them_and_what_would_stand_for_one(bed: Bed) -> None:
    """Each gets one that nobody has: of the apps, and of the proxy itself."""
    pod = bed.pod("a")
    for port in (*WELL_KNOWN, 15101, 15108):
        _start(pod, _listen, _TCP, "::", port)
    assert _chosen(pod) == (15102, 15106, 15109, 15153)


def _connect_from(
    channel: Channel, port: int, destination: tuple[str, int], options: Sequence[int]
) -> None:
    with socket.socket(socket.AF_INET6 if ":" in destination[0] else socket.AF_INET) as client:
        for option in options:
            client.setsockopt(socket.SOL_SOCKET, option, 1)
        client.bind(("", port))
        client.connect(destination)
        channel.send("connected")
        channel.receive()
        # The first to close waits in TIME_WAIT.
        client.shutdown(socket.SHUT_WR)
        client.recv(1)
    channel.send("closed")
    channel.receive()


@pytest.mark.parametrize("options", [(), (socket.SO_REUSEADDR, socket.SO_REUSEPORT)])
def test_a_connections_own_port(bed: Bed, family: str, options: Sequence[int]) -> None:
    """While it lives, and while it waits in TIME_WAIT; by whatever options of an ordinary user."""
    pod, server = bed.pod("a"), bed.pod("b")
    serving = server.spawn(_serve_one, 8080)
    assert serving.receive() == "listening"
    client = _start(pod, _connect_from, 15006, (server.address(family), 8080), options)
    assert _chosen(pod).moved == {15006: 15106}
    assert holders(pod.netns, 15006).startswith(f"{client.pid} (")
    client.send("close")
    assert client.receive() == "closed"
    _await_time_wait(pod, 15006)
    assert holders(pod.netns, 15006) == "connections that have just ended"
    # Who shared it left nothing that would be in the proxy's way.
    assert _chosen(pod).moved == ({} if options else {15006: 15106})


def _serve_one(channel: Channel, port: int) -> None:
    with socket.socket(socket.AF_INET6) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("::", port))
        listening.listen()
        channel.send("listening")
        connection, _ = listening.accept()
        while connection.recv(1):
            pass
        connection.close()
        channel.receive()


def _await_time_wait(pod: BedPod, port: int) -> None:
    waiting = ("ss", "-Htan", "state", "time-wait", f"sport = :{port}")
    deadline = time.monotonic() + 5
    while not pod.command(*waiting):
        assert time.monotonic() < deadline


def test_what_a_proxy_closed_is_not_in_the_way(bed: Bed) -> None:
    """TIME_WAIT of an earlier enrolment does not move its successor's port."""
    pod, client = bed.pod("a"), bed.pod("b")
    with sockets.listener(pod.netns, 15008, netfilter=True) as listening:
        listening.setblocking(True)
        with client.netns.socket(socket.AF_INET, _TCP) as one:
            one.connect((pod.ipv4, 15008))
            accepted, _ = listening.accept()
            accepted.close()
            assert one.recv(1) == b""
    _await_time_wait(pod, 15008)
    assert _chosen(pod) == WELL_KNOWN


def test_where_a_proxy_is_its_ports_are_free_to_the_next(bed: Bed) -> None:
    """One that drains while its successor starts; an app that got in between is moved from."""
    pod = bed.pod("a")
    with _proxy(pod.netns, WELL_KNOWN):
        assert _chosen(pod, served=True) == WELL_KNOWN
        assert choose_ports(pod.netns) == (15101, 15106, 15108, 15153)
    _start(pod, _listen, _TCP, "::", 15001)
    assert _chosen(pod, served=True).moved == {15001: 15101}


def test_ports_that_were_moved_stay_where_they_are(bed: Bed) -> None:
    """Also when the well-known one is free again: what is free is no reason to move."""
    pod = bed.pod("a")
    before = Ports(15105, 15006, 15108, 15053)
    assert choose_ports(pod.netns, before, served=True) == before
    _start(pod, _listen, _TCP, "::", 15105)
    assert choose_ports(pod.netns, before, served=True) == (15001, 15006, 15108, 15053)


def test_none_is_left(bed: Bed) -> None:
    """One line says so, and how to find who has them."""
    pod = bed.pod("a")
    with contextlib.ExitStack() as stack:
        for port in (15006, *range(15106, 15138)):
            stack.enter_context(sockets.listener(pod.netns, port, netfilter=False))
        with pytest.raises(PyambientError) as caught:
            choose_ports(pod.netns)
    assert str(caught.value) == (
        "port 15006 is taken in a, and so is each from 15106 to 15137; "
        "stop what 'ss -anp sport = :15006' shows there"
    )
