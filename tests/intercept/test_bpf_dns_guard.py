"""Queries past the DNS forwarder: of a socket that is older than the enrolment, or written by hand.

Each attack is made twice. With a guard that only counts the query must be on the wire, so the
attack is one; with a guard that drops it must not. In both the guard has to say that it was DNS.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import pytest

from pyambient.intercept.existing import end_older_queries
from pyambient.intercept.options import CaptureOptions
from pyambient.intercept.selection import Selection
from pyambient.intercept.socket_diag import udp_sockets_to
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import PROXY_MARK, RESOLVER_PORT
from tests.bed import Bed, BedPod, Capability, Channel, Child, ClientOptions, capturing, marking
from tests.bed.forging import Datagram, Frame, send_frames, send_packets
from tests.bed.nested import nested, route_to
from tests.bed.patience import wait_for

from .bpf_mesh import BpfMesh, drops_of
from .dns_apps import Answer, ask, resolve, resolver_at
from .test_bpf_guard_attacks import mac_of

_QUERY = b"a query that must not be on the wire"
_TAIL = _QUERY[16:]  # of which a later fragment holds all
_RAW = [Capability.NET_RAW]
_IPV4, _IPV6 = 0x0800, 0x86DD
# Who sends on an ended socket learns that it is connected no more; who waits, that it was ended.
_ENDED = (errno.EDESTADDRREQ, errno.ECONNABORTED)


@pytest.fixture(params=["drop", "count"])
def mode(request: pytest.FixtureRequest) -> str:
    """What becomes of what the guard objects to."""
    return str(request.param)


@pytest.fixture
def pods(bed: Bed) -> Iterator[tuple[BedPod, BedPod, BedPod]]:
    """Pods a and b, and a resolver outside."""
    a, b, outside = bed.pod("a"), bed.pod("b"), bed.pod("outside")
    with resolve(outside):
        yield a, b, outside


def connected(channel: Channel, resolver: SocketAddress, mark: int | None = None) -> None:
    """An app that keeps one socket, connected to its resolver; it answers with data or an errno."""
    with ClientOptions(mark=mark, timeout=0.5).socket(resolver, socket.SOCK_DGRAM) as client:
        client.connect(resolver.sockaddr())
        channel.send("ready")
        while channel.receive() == "ask":
            try:
                client.send(_QUERY)
                channel.send(client.recv(100))
            except OSError as error:
                channel.send(error.errno or -1)


def asking(pod: BedPod, resolver: SocketAddress, mark: int | None = None) -> Child:
    child = pod.spawn(connected, resolver, mark, capabilities=marking(pod) if mark else [])
    assert child.receive() == "ready"
    return child


def dropped(pod: BedPod) -> dict[str, int]:
    return {reason: count for reason, count in drops_of(pod).counts.items() if count}


@pytest.mark.parametrize("mark", [None, PROXY_MARK], ids=["unprivileged", "forged mark"])
def test_a_socket_connected_before_the_enrolment(bed, kernel, pods, family, mode, mark) -> None:
    """No hook sees it send: the query stays in the pod. Its owner's next socket is captured."""
    del kernel
    a, b, outside = pods
    resolver = resolver_at(outside, family)
    with (
        asking(a, resolver, mark) as child,
        BpfMesh(bed, a, b, options=CaptureOptions(guard=mode)) as mesh,
    ):
        with capturing(outside) as wire:
            answer = child.ask("ask")
            assert isinstance(a.run(ask, resolver, b"fresh"), Answer)
        arrived = any(_QUERY in frame for frame in wire.frames)
        assert (arrived, answer == _QUERY) == (mode == "count", mode == "count")
        assert (dropped(a), dropped(b)) == ({"dns": 1}, {})
        assert [seen.original for seen in mesh.intercepted()] == [resolver]


def test_freed_it_asks_again(bed, pods, family) -> None:
    a, b, outside = pods
    with asking(a, resolver_at(outside, family)) as child:
        with BpfMesh(bed, a, b):
            assert child.ask("ask") == -1
        assert child.ask("ask") == _QUERY


@pytest.mark.parametrize("uncaptured", ["excluded address", "excluded port", "DNS"])
def test_what_is_not_captured_goes_on(bed, pods, family, uncaptured) -> None:
    """A resolver that the operator left out, and a pod without DNS capture."""
    a, b, outside = pods
    resolver = resolver_at(outside, family)
    outbound = {
        "excluded address": Selection.from_json({"exclude_cidrs": resolver.ip}),
        "excluded port": Selection.from_json({"exclude_ports": "53"}),
        "DNS": Selection(),
    }[uncaptured]
    options = CaptureOptions(outbound=outbound, dns=uncaptured != "DNS")
    with asking(a, resolver) as child, BpfMesh(bed, a, b, options=options):
        assert child.ask("ask") == _QUERY
        assert dropped(a) == {}


class Attack:
    """What pod a sends by hand to the resolver outside."""

    def __init__(self, pods: tuple[BedPod, BedPod, BedPod], family: str) -> None:
        self.a, _, self.outside = pods
        self.family = family
        source = SocketAddress(self.a.address(family), 4711)
        self.query = Datagram(source, resolver_at(self.outside, family), payload=_QUERY)

    def judged(self, attack: Callable[[], object], capabilities: Iterable[Capability]) -> bool:
        """Whether it was on the wire; the guard has to count something in any case."""
        with capturing(self.outside) as wire:
            self.a.run(attack, capabilities=list(capabilities))
            wait_for(lambda: dropped(self.a))
        return any(_TAIL in frame for frame in wire.frames)

    def packets(self, how: str) -> list[bytes]:
        split = self.query.fragments6 if self.family == "v6" else self.query.fragments4
        return list(split()) if how == "fragments" else [self.query.packet()]

    def frame(self) -> Frame:
        kind = _IPV6 if self.family == "v6" else _IPV4
        return Frame(mac_of(self.outside), kind, kind)


@pytest.mark.parametrize("how", ["packet", "fragments", "frame"])
def test_a_query_written_by_a_raw_or_packet_socket(bed, pods, family, mode, how) -> None:
    """Whoever writes it: its bytes count. A later fragment alone is worth nothing."""
    attack = Attack(pods, family)
    with BpfMesh(bed, *pods[:2], options=CaptureOptions(guard=mode)):
        packets = attack.packets(how)
        send = partial(send_packets, packets, attack.query.destination)
        if how == "frame":
            send = partial(send_frames, attack.frame(), packets)
        with capturing(pods[2]) as wire:
            attack.judged(send, _RAW)
        heads = [frame for frame in wire.frames if b"\x12\x67\x00\x35" in frame]
        assert (bool(heads), dropped(pods[0])) == (mode == "count", {"dns": 1})


@pytest.mark.parametrize("hidden", ["options", "fragment"])
def test_a_query_behind_extension_headers(bed, pods, mode, hidden) -> None:
    """The first fragment has to say what it is; with options ahead it is still UDP."""
    attack = Attack(pods, "v6")
    query = attack.query
    packets = list(query.fragments6_behind_options())
    reason = {"unreadable": 2}
    if hidden == "options":
        packets, reason = [query.behind_options()], {"dns": 1}
    with BpfMesh(bed, *pods[:2], options=CaptureOptions(guard=mode)):
        send = partial(send_packets, packets, query.destination)
        assert attack.judged(send, _RAW) == (mode == "count")
        assert dropped(pods[0]) == reason


def test_a_query_that_bypasses_tc(bed, pods, family, mode) -> None:
    """PACKET_QDISC_BYPASS gets it out of the pod, and not past the node's guard."""
    attack = Attack(pods, family)
    with BpfMesh(bed, *pods[:2], options=CaptureOptions(guard=mode, guard_node=True)):
        send = partial(send_frames, attack.frame(), [attack.query.packet()], bypass=True)
        assert attack.judged(send, _RAW) == (mode == "count")
        assert dropped(pods[0]) == {"unsigned": 1}


def test_other_datagrams_are_as_before(bed, pods, family) -> None:
    """UDP to other ports, large ones in fragments as well; also without DNS capture."""
    a, b, outside = pods
    resolve(outside, 5300)
    elsewhere = SocketAddress(outside.address(family), 5300)
    with BpfMesh(bed, a, b, options=CaptureOptions(guard_node=True)):
        for data in (b"small", b"x" * 5000):
            answer = a.run(ask, elsewhere, data)
            assert isinstance(answer, Answer), answer
            assert answer.data == data
        assert dropped(a) == {}


def test_older_sockets_are_ended(bed, pods, family) -> None:
    """Whoever asks past the proxy learns it at once; who asks inside the pod, or b, goes on."""
    a, b, outside = pods
    resolver = resolver_at(outside, family)
    inside = SocketAddress("127.0.0.1" if family == "v4" else "::1", RESOLVER_PORT)
    with (
        resolve(a),
        asking(a, resolver) as direct,
        asking(a, SocketAddress(a.address(family), RESOLVER_PORT)) as own,
        asking(a, inside) as loopback,
        asking(b, resolver) as other,
    ):
        ended = end_older_queries(a.netns, Selection(), [a.address(family)], bed.cgroup.proxy)
        assert ended == 1
        assert direct.ask("ask") in _ENDED
        assert [child.ask("ask") for child in (own, loopback, other)] == [_QUERY] * 3


def test_the_proxys_own_sockets_are_not_ended(bed, pods, family) -> None:
    """Known by the cgroup they were made in; an app's mark is nothing to go by."""
    a, b, outside = pods
    resolver = resolver_at(outside, family)
    bed.cgroup.proxy.mkdir(exist_ok=True)

    def ask_from_a(channel: Channel) -> None:
        with a.netns.entered():
            connected(channel, resolver, PROXY_MARK)

    proxy = bed.node.spawn(ask_from_a, uid=0, gid=0, cgroup=bed.cgroup.proxy)
    assert proxy.receive() == "ready"
    with proxy, asking(a, resolver, PROXY_MARK) as app, asking(b, resolver):
        assert len(list(udp_sockets_to(a.netns, RESOLVER_PORT))) == 2
        assert end_older_queries(a.netns, Selection(), [], bed.cgroup.proxy) == 1
        assert app.ask("ask") in _ENDED
        assert proxy.ask("ask") == _QUERY


def test_what_is_excluded_is_not_ended(bed, pods, family) -> None:
    a, _, outside = pods
    resolver = resolver_at(outside, family)
    chosen = Selection.from_json({"exclude_cidrs": resolver.ip})
    with asking(a, resolver) as child:
        assert end_older_queries(a.netns, chosen, [], None) == 0
        assert child.ask("ask") == _QUERY


def test_forwarded_queries_do_not_leave(bed, pods, family, mode) -> None:
    """Those of a container nested in the pod, which no hook of the node's need see."""
    a, b, outside = pods
    resolver = resolver_at(outside, family)
    with nested(a) as inner:
        route_to(inner, outside, a)
        with BpfMesh(bed, a, b, options=CaptureOptions(guard=mode)), capturing(outside) as wire:
            inner.run(_send, resolver)
            wait_for(lambda: dropped(a))
        assert any(_QUERY in frame for frame in wire.frames) == (mode == "count")


def _send(resolver: SocketAddress) -> None:
    with socket.socket(resolver.family, socket.SOCK_DGRAM) as client:
        client.sendto(_QUERY, resolver.sockaddr())
