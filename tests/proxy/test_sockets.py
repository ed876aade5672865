"""The proxy's sockets and what it reads of a pod, in real network namespaces."""

from __future__ import annotations

import contextlib
import errno
import socket

import pytest

from pyambient.errors import PyambientError
from pyambient.model.address import SocketAddress, from_sockaddr
from pyambient.model.numbers import HBONE_PORT, PROXY_MARK
from pyambient.proxy import sockets
from pyambient.proxy.addresses import pod_addresses
from tests.bed.descriptors import descriptors_left

SO_MARK = 36


def test_the_addresses_of_a_pod_are_all_but_loopback(bed):
    pod = bed.pod("a")
    bed.pod("b")
    pod.ip("addr add 10.77.0.99/32 dev lo", "addr add 10.99.0.1/24 dev eth0")
    found = pod_addresses(pod.netns)
    link_local = [ip for ip in found if ip.startswith("fe80::")]
    assert set(found) - set(link_local) == {pod.ipv4, pod.ipv6, "10.77.0.99", "10.99.0.1"}
    assert all("%" in ip for ip in link_local)


def test_a_pod_without_ipv6_has_ipv4_addresses_alone(bed):
    pod = bed.pod("a", ipv6=False)
    assert pod_addresses(pod.netns) == (pod.ipv4,)


def test_a_listener_serves_both_families_in_its_own_pod(bed):
    pods = bed.pod("a"), bed.pod("b")
    listeners = [sockets.listener(pod.netns, HBONE_PORT, netfilter=True) for pod in pods]
    for pod, listener in zip(pods, listeners, strict=True):
        for address in (pod.ipv4, pod.ipv6):
            with socket.create_connection((address, HBONE_PORT), timeout=5):
                accepted, peer = wait_accept(listener)
                assert from_sockaddr(accepted.getsockname()) == (address, HBONE_PORT)
                assert from_sockaddr(peer).ip in {"10.77.0.1", "fd77::1"}
                accepted.close()
        listener.close()


def wait_accept(listener):
    listener.setblocking(True)
    listener.settimeout(5)
    return listener.accept()


def test_a_listener_carries_the_mark_and_is_transparent(bed):
    pod = bed.pod("a")
    with sockets.listener(pod.netns, HBONE_PORT, netfilter=True) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, SO_MARK) == PROXY_MARK
        assert listener.getsockopt(socket.IPPROTO_IPV6, 75) == 1


def test_a_listener_of_the_bpf_backends_has_no_mark(bed):
    """An app that is gone must not send its RST past lo, with the mark it answers to."""
    pod = bed.pod("a")
    with sockets.listener(pod.netns, HBONE_PORT, netfilter=False) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, SO_MARK) == 0


def test_a_taken_port_is_one_line_that_names_it(bed):
    pod = bed.pod("a")
    with pod.netns.socket(socket.AF_INET, socket.SOCK_STREAM) as app:
        app.bind(("0.0.0.0", HBONE_PORT))
        app.listen()
        with pytest.raises(PyambientError, match="port 15008 is taken in the pod; stop what"):
            sockets.listener(pod.netns, HBONE_PORT, netfilter=True)


@pytest.mark.parametrize("family", ["v4", "v6"])
def test_a_socket_towards_the_app_bears_the_clients_address(bed, family):
    pod = bed.pod("a")
    client = SocketAddress("10.77.0.77" if family == "v4" else "fd77::77", 40000)
    app = SocketAddress(pod.address(family), 80)
    with sockets.towards_app(sockets.Stock(pod.netns), client, app) as sock:
        ip, port = from_sockaddr(sock.getsockname())
        assert ip == client.ip
        assert 10000 <= port < 30000


def test_the_pod_calling_itself_and_another_family_keep_the_pods_own_address(bed):
    pod = bed.pod("a")
    app = SocketAddress(pod.ipv4, 80)
    for client in (SocketAddress(pod.ipv4, 40000), SocketAddress("fd77::77", 40000)):
        with sockets.towards_app(sockets.Stock(pod.netns), client, app) as sock:
            assert sock.getsockname() == ("0.0.0.0", 0)


def test_without_a_source_port_the_connection_fails_and_leaks_no_socket(bed, monkeypatch):
    pod = bed.pod("a")
    client, app = SocketAddress("10.77.0.77", 40000), SocketAddress(pod.ipv4, 80)
    monkeypatch.setattr(sockets, "_next_source_port", lambda: 10001)
    with pod.netns.socket(socket.AF_INET, socket.SOCK_STREAM) as taken:
        taken.setsockopt(socket.IPPROTO_IP, 19, 1)
        taken.bind((client.ip, 10001))
        with pytest.raises(OSError, match="no source port is free") as failure:
            sockets.towards_app(sockets.Stock(pod.netns), client, app)
    assert failure.value.errno == errno.EADDRNOTAVAIL


def test_a_stock_gives_what_there_are_descriptors_for(bed):
    """It makes one, two and then four at once; two descriptors are for one and the way there."""
    pod = bed.pod("a")
    stock = sockets.Stock(pod.netns)
    with contextlib.ExitStack() as held:
        held.callback(stock.close)
        for _ in range(3):
            held.enter_context(stock.take(socket.AF_INET))
        with descriptors_left(2):
            held.enter_context(stock.take(socket.AF_INET))
            with pytest.raises(OSError, match="Too many open files"):
                stock.take(socket.AF_INET)
        held.enter_context(stock.take(socket.AF_INET))


def test_the_original_destination_is_the_sockets_own_address_unless_netfilter_changed_it(bed):
    pod = bed.pod("a")
    listener = sockets.listener(pod.netns, HBONE_PORT, netfilter=True)
    with listener, socket.create_connection((pod.ipv4, HBONE_PORT), timeout=5):
        accepted, _ = wait_accept(listener)
        with accepted:
            expected = SocketAddress(pod.ipv4, HBONE_PORT)
            assert sockets.original_destination(accepted, netfilter=False) == expected
            assert sockets.original_destination(accepted, netfilter=True) == expected


@pytest.mark.parametrize("family", ["v4", "v6"])
def test_the_original_destination_behind_a_redirect(bed, family):
    pod, client = bed.pod("a"), bed.pod("b")
    tool, full = ("iptables", "32") if family == "v4" else ("ip6tables", "128")
    target = pod.address(family)
    pod.command(
        tool, "-w", "-t", "nat", "-A", "PREROUTING", "-d", f"{target}/{full}",
        "-p", "tcp", "--dport", "80", "-j", "REDIRECT", "--to-ports", str(HBONE_PORT),
    )  # fmt: skip

    def connect(channel):
        sock = socket.create_connection((target, 80), timeout=5)
        channel.send(sock.getsockname()[:2])
        channel.receive()

    with sockets.listener(pod.netns, HBONE_PORT, netfilter=True) as listener:
        child = client.spawn(connect)
        assert child.receive()[0] == client.address(family)
        accepted, _ = wait_accept(listener)
        with accepted:
            assert sockets.original_destination(accepted, netfilter=True) == (target, 80)
            assert sockets.original_destination(accepted, netfilter=False) == (target, HBONE_PORT)
        child.kill()


def test_keep_alive_is_ztunnels():
    with socket.socket() as sock:
        sockets.keep_alive(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 180


def test_a_round_trip_is_known_as_soon_as_there_is_a_connection():
    """The kernel has measured the handshake; what it says is more than nothing, and no minute."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as served,
    ):
        assert all(0 < sockets.round_trip(end) < 60 for end in (client, served))
