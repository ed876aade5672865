"""The bed's instruments: the sniffer, the snapshot, the kernel without BPF, the null proxy."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyambient.model.address import SocketAddress
from tests.bed import (
    Bed,
    BedPod,
    Child,
    ClientOptions,
    NullProxy,
    apps,
    capturing,
    changes,
    forbid_bpf,
    kernel_state,
    nobpf,
)
from tests.bed.bpf import NETNS_TYPES, SYSCALL_NUMBER, attached

# Istio's in-pod rules, as far as two TCP ports need them.
_RULES = """
*mangle
-A PREROUTING -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark
COMMIT
*nat
-A OUTPUT -p tcp --dport 8080 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
-A PREROUTING -i eth0 -p tcp --dport 8080 -j REDIRECT --to-ports 15006
COMMIT
"""


def _redirect_by_hand(pod: BedPod) -> None:
    for tool in ("iptables-restore", "ip6tables-restore"):
        pod.command(tool, text=_RULES)
    for family in ("-4", "-6"):
        _command(pod, f"ip {family} rule add fwmark 0x111/0xfff pref 32764 lookup 100")
        _command(pod, f"ip {family} route add local default dev lo table 100")


def _command(pod: BedPod, line: str) -> None:
    pod.command(*line.split())


@pytest.fixture
def pods(bed: Bed) -> tuple[BedPod, BedPod]:
    """A client's pod and a server's pod."""
    return bed.pod("a"), bed.pod("b")


@pytest.fixture
def echo(pods: tuple[BedPod, BedPod]) -> Iterator[Child]:
    """An echo server on port 8080 of the second pod."""
    with pods[1].spawn(apps.echo_server, 8080) as server:
        assert server.receive() == "listening"
        yield server


def test_a_capture_sees_both_directions_whole(
    pods: tuple[BedPod, BedPod], echo: Child, family: str
) -> None:
    """Every byte of a connection is in the capture, with its true addresses."""
    client, server = pods
    destination = SocketAddress(server.address(family), 8080)
    with capturing(client) as capture:
        seen = client.run(apps.request, destination, b"marker" * 50_000)
    there = [one for one in capture.packets if one.destination == destination]
    back = [one for one in capture.packets if one.source == destination]
    # What a busy machine made TCP send again is in it twice.
    for way in (there, back):
        assert sum(len(one.payload) for one in way) >= 300_000
        assert all(one.payload in b"marker" * 50_001 for one in way)
    assert {one.source for one in there} == {seen.local}
    assert there[0].flags == 0x02


def test_a_capture_holds_what_others_send_too(pods: tuple[BedPod, BedPod], family: str) -> None:
    """UDP is captured as well, and a port can be told from another."""
    client, server = pods
    with capturing(server) as capture:
        dns = SocketAddress(server.address(family), 53)
        client.run(apps.udp_request, dns, b"query", ClientOptions(timeout=0.1))
    (query,) = [one for one in capture.packets if one.payload == b"query"]
    assert query.ports[1] == 53


def test_a_snapshot_is_stable(pods: tuple[BedPod, BedPod], echo: Child, family: str) -> None:
    """Traffic and time change nothing in a snapshot."""
    before = kernel_state(*pods)
    pods[0].run(apps.request, SocketAddress(pods[1].address(family), 8080))
    assert changes(before, kernel_state(*pods)) == []


@pytest.mark.parametrize(
    "change",
    [
        "ip rule add fwmark 0x111/0xfff pref 32764 lookup 100",
        "ip -6 rule add fwmark 0x111/0xfff pref 32764 lookup 100",
        "ip route add local default dev lo table 100",
        "ip -6 route add local default dev lo table 100",
        "ip addr add 169.254.7.127/32 dev lo",
        "sysctl -w net.ipv4.tcp_fwmark_accept=1",
        "sysctl -w net.ipv6.fwmark_reflect=1",
        "sysctl -w net.ipv4.ip_local_reserved_ports=15001",
        "nft add table ip mine",
        "iptables -t nat -N MINE",
        "ip6tables-legacy -t mangle -N MINE",
        "tc qdisc add dev eth0 clsact",
    ],
)
def test_a_snapshot_sees_what_a_pod_was_given(pods: tuple[BedPod, BedPod], change: str) -> None:
    """Each kind of thing that an enrolment may add to a pod changes that pod's snapshot alone."""
    before = kernel_state(*pods)
    _command(pods[1], change)
    after = kernel_state(*pods)
    assert {line.split("/")[1] for line in changes(before, after)} == {"b"}


def test_a_snapshot_sees_a_listener_of_ours(pods: tuple[BedPod, BedPod]) -> None:
    """A proxy's socket left in a pod is seen."""
    before = kernel_state(*pods)
    with pods[0].spawn(apps.echo_server, 15008) as server:
        server.receive()
        assert kernel_state(*pods)["a"]["listeners"] != before["a"]["listeners"]
    assert changes(before, kernel_state(*pods)) == []


def _bpf(command: int, attributes: bytes) -> int:
    result = ctypes.CDLL(None, use_errno=True).syscall(SYSCALL_NUMBER, command, attributes, 128)
    assert result >= 0, os.strerror(ctypes.get_errno())
    return int(result)


def _load_allow_all(kind: int, attach_type: int) -> int:
    """An fd of the program `return 1`."""
    code = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0), 16)
    terms = ctypes.create_string_buffer(b"GPL")
    pointers = (ctypes.addressof(code), ctypes.addressof(terms))
    head = struct.pack("=IIQQ", kind, 2, *pointers)
    return _bpf(5, head.ljust(68, b"\0") + struct.pack("=I", attach_type) + bytes(56))


def test_a_snapshot_sees_programs_and_pins(pods: tuple[BedPod, BedPod]) -> None:
    """A program on the session's cgroup, one on a pod's namespace, and a pin are all seen."""
    before = kernel_state(*pods)
    connect4, sk_lookup = _load_allow_all(18, 10), _load_allow_all(30, 36)
    cgroup = os.open(pods[0].bed.cgroup.path, os.O_RDONLY)
    _bpf(8, struct.pack("=IIII", cgroup, connect4, 10, 2).ljust(128, b"\0"))
    link = _bpf(28, struct.pack("=IIII", sk_lookup, pods[0].netns.fd, 36, 0).ljust(128, b"\0"))
    pin = ctypes.create_string_buffer(b"/sys/fs/bpf/mine")
    _bpf(6, struct.pack("=QI", ctypes.addressof(pin), connect4).ljust(128, b"\0"))

    after = kernel_state(*pods)
    assert after["node"]["cgroup programs"] == {pods[0].bed.cgroup.path.name: {10: 1}}
    assert after["a"]["programs"] == {36: 1}
    assert "mine" in after["node"]["pins"]

    _bpf(9, struct.pack("=IIII", cgroup, connect4, 10, 0).ljust(128, b"\0"))
    Path("/sys/fs/bpf/mine").unlink()
    for fd in (connect4, sk_lookup, cgroup, link):
        os.close(fd)
    assert changes(before, kernel_state(*pods)) == []


def test_nobpf_answers_enosys() -> None:
    """A command run by nobpf, and its children, meet a kernel without bpf(2)."""
    code = (
        "import ctypes,subprocess,sys;"
        "libc=ctypes.CDLL(None,use_errno=True);"
        "assert libc.syscall(int(sys.argv[1]),0,0,0)==-1;"
        "print(ctypes.get_errno())"
    )
    line = nobpf("sh", "-c", 'exec "$@"', "sh", sys.executable, "-c", code, str(SYSCALL_NUMBER))
    output = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    assert int(output) == errno.ENOSYS


def test_bpf_can_be_forbidden_to_a_child_alone(pods: tuple[BedPod, BedPod]) -> None:
    """A child that forbids itself bpf(2) sees nothing attached; others go on as before."""

    def query() -> dict[int, int]:
        forbid_bpf()
        return attached(pods[0].netns.fd, NETNS_TYPES)

    assert pods[0].run(query, uid=0, gid=0) == {}


def test_the_null_proxy_relays_both_ways(
    bed: Bed, pods: tuple[BedPod, BedPod], echo: Child, family: str
) -> None:
    """Redirected by hand, a connection passes both proxies and keeps source and destination."""
    client, server = pods
    destination = SocketAddress(server.address(family), 8080)
    with NullProxy.of(bed, pods, "nftables") as proxy:
        for pod in pods:
            _redirect_by_hand(pod)
        seen = client.run(apps.request, destination, b"x" * 300_000)
        outbound, inbound = sorted(proxy.accepted(), key=lambda one: one.port)

    assert (seen.data, seen.peer) == (b"x" * 300_000, destination)
    assert (outbound.pod, outbound.port, outbound.peer) == ("a", 15001, seen.local)
    assert (inbound.pod, inbound.port) == ("b", 15006)
    assert outbound.original == inbound.original == destination
    (accepted,) = echo.ask("accepted")
    assert accepted.peer.ip == client.address(family)
    assert 10_000 <= accepted.peer.port < 30_000
    assert accepted.local == destination


def test_the_null_proxy_passes_a_refusal_on(bed: Bed, pods: tuple[BedPod, BedPod]) -> None:
    """What the destination refuses is reset at once, and noted with its errno."""
    client, server = pods
    with NullProxy.of(bed, [client], "nftables") as proxy:
        _redirect_by_hand(client)
        seen = client.run(apps.request, SocketAddress(server.address("v4"), 8080))
        (noted,) = proxy.accepted()
    assert seen.errno == errno.ECONNRESET
    assert noted.failure == errno.ECONNREFUSED


def test_the_null_proxy_does_not_call_itself(bed: Bed, pods: tuple[BedPod, BedPod]) -> None:
    """A connection to a listener itself is reset, and ends there."""
    client, server = pods
    with NullProxy.of(bed, [server], "bpf") as proxy:
        seen = client.run(apps.request, SocketAddress(server.address("v4"), 15001))
        (noted,) = proxy.accepted()
    assert seen.failed
    assert noted.failure == errno.ELOOP


def test_the_null_proxy_can_stop_listening(
    bed: Bed, pods: tuple[BedPod, BedPod], echo: Child
) -> None:
    """Its listeners close, and what it relays goes on."""
    client, server = pods
    with NullProxy.of(bed, [client], "nftables") as proxy:
        _redirect_by_hand(client)
        holder = client.spawn(apps.hold, SocketAddress(server.address("v4"), 8080), 5)
        assert holder.receive() == {}
        proxy.stop_listening()
        assert holder.ask("ping") == {}
        later = client.run(apps.request, SocketAddress(server.address("v4"), 8080))
    assert later.errno == errno.ECONNREFUSED
