"""BPF programs alone, run by the kernel on packets and look-ups made here: decisions as tables.

A packet of such a run comes from a socket that the kernel makes for it, of no type: what a guard
says of it is what it says of a packet socket's.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pyambient.intercept.entry import Choice, device_entry, lookup_entry
from pyambient.intercept.guard_maps import DROPS, REASONS
from pyambient.intercept.kernel_objects import Map, MapType
from pyambient.intercept.loader import Constants, LoadedObject, load
from pyambient.intercept.selection import Selection
from pyambient.intercept.selection_map import entries
from pyambient.model.address import SocketAddress
from tests.bed.bpf import run_program
from tests.bed.forging import Datagram, Forged

_UNSPEC, _SHOT = -1, 2
_DROP, _PASS = 0, 1
_NETNS = 4711
_SIGN = 99
_OUTBOUND, _INBOUND, _HBONE, _DNS = 15001, 15006, 15008, 15053

_MACS = bytes.fromhex("020000000002 020000000001")
_TAG, _OUTER_TAG = bytes.fromhex("8100 0007"), bytes.fromhex("88a8 0008")
_TYPES = {"v4": b"\x08\0", "v6": b"\x86\xdd"}
_ENDS = {
    "v4": (SocketAddress("10.77.0.2", 40000), SocketAddress("10.77.0.9", 80)),
    "v6": (SocketAddress("fd77::2", 40000), SocketAddress("fd77::9", 80)),
}
_OTHER, _SEGMENT, _UNREADABLE, _QUERY = "other", "segment", "unreadable", "query"


def _frame(family: str, packet: bytes, tags: bytes = b"") -> bytes:
    return _MACS + tags + _TYPES[family] + packet


def _resolver(family: str) -> SocketAddress:
    return SocketAddress(_ENDS[family][1].ip, 53)


def _packets(family: str) -> Iterator[tuple[str, bytes, str]]:
    """(what it is, the frame, how it is to be read) for both families alike."""
    segment = Forged(*_ENDS[family], payload=b"x" * 40)
    datagram = Datagram(*_ENDS[family], payload=b"x" * 40)
    query = Datagram(_ENDS[family][0], _resolver(family), payload=b"x" * 40)
    yield "a segment", _frame(family, segment.packet()), _SEGMENT
    yield "a SYN", _frame(family, Forged(*_ENDS[family], flags=2).packet()), _SEGMENT
    yield "a segment with a tag", _frame(family, segment.packet(), _TAG), _SEGMENT
    yield "with two tags", _frame(family, segment.packet(), _OUTER_TAG + _TAG), _SEGMENT
    yield "with three tags", _frame(family, segment.packet(), _TAG * 3), _UNREADABLE
    yield "a datagram", _frame(family, datagram.packet()), _OTHER
    yield "a query", _frame(family, query.packet()), _QUERY
    yield "a query with a tag", _frame(family, query.packet(), _TAG), _QUERY
    yield "to port 53 over TCP", _frame(family, Forged(*_to_port_53(family)).packet()), _SEGMENT


def _to_port_53(family: str) -> tuple[SocketAddress, SocketAddress]:
    return _ENDS[family][0], _resolver(family)


def _packets_v4() -> Iterator[tuple[str, bytes, str]]:
    segment = Forged(*_ENDS["v4"], payload=b"x" * 40)
    query = Datagram(_ENDS["v4"][0], _resolver("v4"), payload=b"x" * 40)
    first, later = segment.fragments4()
    yield "a first fragment of TCP", _frame("v4", first), _UNREADABLE
    yield "a later fragment of TCP", _frame("v4", later), _UNREADABLE
    first, later = query.fragments4()
    yield "a first fragment of a query", _frame("v4", first), _QUERY
    yield "a later fragment of a query", _frame("v4", later), _OTHER
    yield "a header of 16 bytes", _frame("v4", b"\x44" + segment.packet()[1:]), _UNREADABLE
    yield "of another version", _frame("v4", b"\x65" + segment.packet()[1:]), _UNREADABLE
    options = b"\x46" + segment.packet()[1:20] + bytes(4) + segment.packet()[20:]
    yield "options of IPv4", _frame("v4", options), _SEGMENT
    yield "ARP", _MACS + b"\x08\x06" + bytes(28), _OTHER


def _packets_v6() -> Iterator[tuple[str, bytes, str]]:
    segment = Forged(*_ENDS["v6"], payload=b"x" * 40)
    first, later = segment.fragments6()
    yield "a first fragment of TCP", _frame("v6", first), _UNREADABLE
    yield "a later fragment of TCP", _frame("v6", later), _UNREADABLE
    _, later = segment.fragments6(first_says=socket.IPPROTO_DSTOPTS)
    yield "a later fragment that says options", _frame("v6", later), _UNREADABLE
    first, _ = segment.fragments6_behind_options()
    yield "a first fragment of options alone", _frame("v6", first), _UNREADABLE
    yield "behind options", _frame("v6", segment.behind_options()), _SEGMENT
    yield "behind many options", _frame("v6", segment.behind_many_options()), _UNREADABLE
    yield "of another version", _frame("v6", b"\x45" + segment.packet()[1:]), _UNREADABLE


_TABLE = [
    pytest.param(frame, kind, id=f"{family}: {name}")
    for family, packets in (
        ("v4", [*_packets("v4"), *_packets_v4()]),
        ("v6", [*_packets("v6"), *_packets_v6()]),
    )
    for name, frame, kind in packets
]


_CUT = [
    pytest.param(Forged(*_ENDS["v4"]).packet(), id="v4"),
    pytest.param(Forged(*_ENDS["v6"]).packet(), id="v6"),
    pytest.param(Forged(*_ENDS["v6"]).behind_options(), id="v6 behind options"),
]


@dataclass
class Guard:
    """A guard's program and what it counted."""

    name: str
    fd: int
    drops: Map
    gates: Map

    def verdict(self, frame: bytes) -> tuple[int, list[str]]:
        """What it returns, and the reasons that it counted for this packet."""
        before = self._counted()
        returned, _ = run_program(self.fd, data=frame)
        after = self._counted()
        return returned, [name for name in REASONS if after[name] > before[name]]

    def capture_dns(self) -> None:
        self.gates.put(struct.pack("=Q", _NETNS), b"\1")

    def _counted(self) -> dict[str, int]:
        raw = self.drops.get(struct.pack("=Q", _NETNS))
        assert raw is not None
        return dict(zip(REASONS, struct.unpack_from(f"={len(REASONS)}Q", raw), strict=True))


def _loaded(name: str, constants: Constants) -> Iterator[tuple[LoadedObject, dict[str, Map]]]:
    with load(name, constants) as loaded:
        maps = loaded.maps()
        try:
            yield loaded, maps
        finally:
            for one in maps.values():
                one.close()


@contextlib.contextmanager
def _offered(program: int) -> Iterator[Map]:
    """A shared program, as the pods' entries find it."""
    with Map.create(MapType.PROG_ARRAY, "program", (4, 4), 1, 0) as array:
        array.put(bytes(4), struct.pack("=I", program))
        yield array


@pytest.fixture(params=["guard", "guard_node"])
def guard(request: pytest.FixtureRequest, isolated: None) -> Iterator[Guard]:
    """Both guards, the pod's own by an entry to it."""
    constants = Constants(netns=_NETNS, sign=_SIGN)
    for loaded, maps in _loaded(request.param, constants):
        maps[DROPS].put(struct.pack("=Q", _NETNS), bytes(maps[DROPS].value_size))
        with (
            _offered(loaded.program_fd(f"pyamb_{request.param}")) as program,
            device_entry("entry", program, _NETNS, Choice.IS_ETHERNET, _SIGN) as entry,
        ):
            yield Guard(request.param, entry.fd, maps[DROPS], maps["dns_pods"])


def _reason(guard: Guard, kind: str) -> str:
    if guard.name == "guard_node":
        return "unsigned"
    return {_SEGMENT: "raw", _UNREADABLE: "unreadable", _QUERY: "dns"}[kind]


@pytest.mark.parametrize(("frame", "kind"), _TABLE)
def test_what_a_guard_says_of_a_packet(guard: Guard, frame: bytes, kind: str) -> None:
    """Queries pass as long as the pod's DNS is not captured; all else that is not other stops."""
    stops = kind in (_SEGMENT, _UNREADABLE)
    said = (_SHOT, [_reason(guard, kind)]) if stops else (_UNSPEC, [])
    assert guard.verdict(frame) == said
    guard.capture_dns()
    if kind == _QUERY:
        said = (_SHOT, [_reason(guard, kind)])
    assert guard.verdict(frame) == said


@pytest.mark.parametrize("packet", _CUT)
def test_a_segment_cut_off_anywhere_stops(guard: Guard, packet: bytes) -> None:
    """A header that is not there cannot prove what the packet is."""
    family, head = ("v4", 20) if packet[0] >> 4 == 4 else ("v6", 40)  # test runs want that much
    cut = [_frame(family, packet[:size]) for size in range(head, len(packet))]
    assert {guard.verdict(frame)[0] for frame in cut} == {_SHOT}


@dataclass(frozen=True)
class Lookup:
    """A new connection that arrives: struct bpf_sk_lookup."""

    remote: SocketAddress
    local: SocketAddress
    protocol: int = socket.IPPROTO_TCP

    def context(self) -> bytes:
        remote, local = _packed(self.remote.ip), _packed(self.local.ip)
        places = (remote, b"", local, b"") if len(remote) == 4 else (b"", remote, b"", local)
        head = struct.pack("=QII4s16s", 0, self.remote.family, self.protocol, *places[:2])
        ports = struct.pack("!H", self.remote.port) + bytes(2)
        tail = struct.pack("=4s16sII4x", *places[2:], self.local.port, 0)
        return head + ports + tail


def _packed(ip: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip)


def _mapped(ip: str) -> bytes:
    packed = _packed(ip)
    return packed if len(packed) == 16 else bytes(10) + b"\xff\xff" + packed


@dataclass
class Steering:
    """A pod's sk_lookup program with listeners of the proxy's."""

    fd: int
    maps: dict[str, Map]
    cookies: dict[int, int]

    def answer(self, lookup: Lookup) -> tuple[int, int | None]:
        """What it returns, and the port of the listener that it chose."""
        returned, context = run_program(self.fd, context=lookup.context())
        (cookie,) = struct.unpack_from("=Q", context)
        return returned, self.cookies[cookie] if cookie else None


_POD = {"v4": "10.77.0.2", "v6": "fd77::2"}
_PEER = {"v4": "10.77.0.9", "v6": "fd77::9"}
_STRANGER = {"v4": "10.99.0.1", "v6": "fd99::1"}
_LOOPBACK = {"v4": "127.0.0.1", "v6": "::1"}
_SO_COOKIE = 57


@pytest.fixture
def steering(isolated: None) -> Iterator[Steering]:
    """The listeners are in the map; the addresses of both families are the pod's."""
    constants = Constants(has_ingress_ifindex=True)
    listeners = {port: _listener() for port in _PORTS}
    try:
        for loaded, maps in _loaded("lookup", constants):
            for port, sock in listeners.items():
                key = struct.pack("=QII", _NETNS, port, 0)
                maps["listeners"].put(key, struct.pack("=Q", sock.fileno()))
            for ip in _POD.values():
                maps["addresses"].put(struct.pack("=Q16s", _NETNS, _mapped(ip)), b"\1")
            cookies = {_cookie(sock): port for port, sock in listeners.items()}
            with (
                _offered(loaded.program_fd("pyamb_sk_lookup")) as program,
                lookup_entry("entry", program, maps["entered"], _NETNS) as entry,
            ):
                yield Steering(entry.fd, maps, cookies)
    finally:
        for sock in listeners.values():
            sock.close()


_PORTS = (_OUTBOUND, _INBOUND, _HBONE, _DNS)


def _listener() -> socket.socket:
    """For both families, as the proxy's are."""
    return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)


def _cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), "little")


def _lookup(ends: tuple[dict[str, str], dict[str, str]], port: int, family: str) -> Lookup:
    remote, local = ends
    return Lookup(SocketAddress(remote[family], 40000), SocketAddress(local[family], port))


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize(
    ("ends", "port", "answer"),
    [
        pytest.param((_PEER, _POD), 8080, (_PASS, _INBOUND), id="to an app of the pod"),
        pytest.param((_PEER, _POD), _HBONE, (_PASS, _HBONE), id="to the HBONE port"),
        pytest.param((_PEER, _POD), _OUTBOUND, (_PASS, _INBOUND), id="to 15001 from outside"),
        pytest.param((_PEER, _POD), 53, (_PASS, _INBOUND), id="to a resolver in the pod"),
        pytest.param((_POD, _PEER), 8080, (_PASS, _OUTBOUND), id="of an app"),
        pytest.param((_POD, _PEER), _HBONE, (_PASS, _OUTBOUND), id="of an app to an HBONE port"),
        pytest.param((_POD, _PEER), 53, (_PASS, _OUTBOUND), id="of an app to a resolver"),
        pytest.param((_POD, _POD), 8080, (_PASS, None), id="of the pod to itself"),
        pytest.param((_LOOPBACK, _LOOPBACK), 8080, (_PASS, None), id="by loopback"),
        pytest.param((_LOOPBACK, _POD), 8080, (_PASS, None), id="from loopback to the pod"),
        pytest.param((_POD, _LOOPBACK), 8080, (_PASS, None), id="from the pod to loopback"),
        pytest.param((_PEER, _LOOPBACK), 8080, (_PASS, None), id="from outside to loopback"),
        pytest.param((_STRANGER, _PEER), 8080, (_DROP, None), id="of nobody to nobody"),
    ],
)
def test_which_listener_gets_it(
    steering: Steering,
    ends: tuple[dict[str, str], dict[str, str]],
    port: int,
    answer: tuple[int, int | None],
    family: str,
) -> None:
    """By addresses alone; what arrives on lo is for tests with real sockets."""
    assert steering.answer(_lookup(ends, port, family)) == answer


@pytest.mark.parametrize("family", ["v4", "v6"])
class TestWhatChangesTheAnswer:
    """Each with the same two connections: of an app, and to one."""

    @staticmethod
    def _both(steering: Steering, family: str, port: int = 8080) -> list[tuple[int, int | None]]:
        ends = ((_POD, _PEER), (_PEER, _POD))
        return [steering.answer(_lookup(pair, port, family)) for pair in ends]

    def test_captured_dns(self, steering: Steering, family: str) -> None:
        """A connection to a resolver has a listener of its own then; one to an app has not."""
        steering.maps["dns_pods"].put(struct.pack("=Q", _NETNS), b"\1")
        assert self._both(steering, family, 53) == [(_PASS, _DNS), (_PASS, _INBOUND)]

    def test_another_pods_dns(self, steering: Steering, family: str) -> None:
        """What is said of one namespace is not for another."""
        steering.maps["dns_pods"].put(struct.pack("=Q", _NETNS + 1), b"\1")
        assert self._both(steering, family, 53) == [(_PASS, _OUTBOUND), (_PASS, _INBOUND)]

    def test_a_missing_listener(self, steering: Steering, family: str) -> None:
        """Fails closed."""
        for port in (_OUTBOUND, _INBOUND):
            steering.maps["listeners"].delete(struct.pack("=QII", _NETNS, port, 0))
        assert self._both(steering, family) == [(_DROP, None), (_DROP, None)]

    def test_another_pods_address(self, steering: Steering, family: str) -> None:
        """It is not this pod's for having the same number."""
        key = struct.pack("=Q16s", _NETNS, _mapped(_POD[family]))
        steering.maps["addresses"].delete(key)
        steering.maps["addresses"].put(struct.pack("=Q", _NETNS + 1) + key[8:], b"\1")
        assert self._both(steering, family) == [(_DROP, None), (_DROP, None)]

    def test_a_probe_of_the_node(self, steering: Steering, family: str) -> None:
        """Known by both its ends; from another port it is somebody else's connection."""
        probe = _lookup((_PEER, _POD), 8080, family)
        ends = _mapped(probe.remote.ip), _mapped(probe.local.ip), probe.remote.port, 8080
        steering.maps["probes"].put(struct.pack("=Q16s16sII", 0, *ends), b"\1")
        other = Lookup(SocketAddress(probe.remote.ip, 40001), probe.local)
        assert steering.answer(probe) == (_PASS, None)
        assert steering.answer(other) == (_PASS, _INBOUND)

    def test_other_protocols(self, steering: Steering, family: str) -> None:
        """UDP stays as it is."""
        for ends in ((_POD, _PEER), (_PEER, _POD), (_STRANGER, _PEER)):
            tcp = _lookup(ends, 8080, family)
            udp = Lookup(tcp.remote, tcp.local, socket.IPPROTO_UDP)
            assert steering.answer(udp) == (_PASS, None)

    def test_an_excluded_port(self, steering: Steering, family: str) -> None:
        """Left to the app; not so the HBONE port, which is the mesh's own."""
        chosen = Selection.from_json({"exclude_ports": f"8080,{_HBONE}"})
        key = struct.pack("=QQ", _NETNS, 1)
        with Map.create(MapType.LPM_TRIE, "selection", (24, 1), 1 << 17, 1) as trie:
            trie.put_all(entries(chosen))
            steering.maps["selections"].put(key, struct.pack("=I", trie.fd))
        assert self._both(steering, family) == [(_PASS, _OUTBOUND), (_PASS, None)]
        assert self._both(steering, family, _HBONE) == [(_PASS, _OUTBOUND), (_PASS, _HBONE)]
