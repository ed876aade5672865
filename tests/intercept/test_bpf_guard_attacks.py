"""Attacks on the leak guard by apps with CAP_NET_RAW: what they write never gets to the wire.

Each is made twice. With a guard that only counts the bytes must arrive, so the attack is one; with
a guard that drops they must not. In both the guard has to say what it was.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from pyambient.intercept.guard_maps import Drops
from pyambient.intercept.options import CaptureOptions
from tests.bed import Bed, BedPod, Capability, capturing, marking
from tests.bed.forging import (
    ACK,
    PSH,
    SYN,
    Forged,
    Frame,
    send_frames,
    send_packets,
    send_tcp,
)
from tests.bed.patience import wait_for

from .bpf_mesh import BpfMesh, at, drops_of, serve

MARKER = b"bytes that must not be on the wire"
_TAIL = MARKER[8:]  # of which a later fragment holds all
_IPV4, _IPV6, _ARP = 0x0800, 0x86DD, 0x0806
_TAG = bytes.fromhex("8100 0005")


@dataclass(frozen=True, slots=True)
class Setting:
    """Who attacks: pod `a`, enrolled as `b` is; `outside` is not, and its `mac` is known."""

    a: BedPod
    b: BedPod
    outside: BedPod
    mac: bytes
    mode: str

    def drops(self, pod: BedPod | None = None) -> Drops:
        return drops_of(pod or self.a)

    def segment(self, family: str, flags: int = ACK | PSH, payload: bytes = MARKER) -> Forged:
        return Forged(at(self.a, family, 4711), at(self.outside, family, 80), flags, payload)

    def assert_judged(
        self, attack: Callable[[], object], capabilities: Iterable[Capability], reason: str
    ) -> None:
        """The marker leaves the pod if the guard only counts; it counts `reason` in any case."""
        with capturing(self.outside) as capture:
            self.a.run(attack, capabilities=list(capabilities))
            wait_for(lambda: self.drops().total)
        arrived = any(_TAIL in frame for frame in capture.frames)
        counts = {name: n for name, n in self.drops().counts.items() if n}
        assert (arrived, set(counts)) == (self.mode == "count", {reason})
        assert self.drops(self.b).total == 0


def mac_of(pod: BedPod) -> bytes:
    (link,) = json.loads(pod.command("ip", "-j", "link", "show", "eth0"))
    return bytes.fromhex(link["address"].replace(":", ""))


@pytest.fixture(params=["drop", "count"])
def setting(request: pytest.FixtureRequest, bed: Bed) -> Iterator[Setting]:
    """Two pods in the mesh, with guards that drop, or that only count."""
    a, b, outside = bed.pod("a"), bed.pod("b"), bed.pod("outside")
    with BpfMesh(bed, a, b, options=CaptureOptions(guard=request.param)):
        yield Setting(a, b, outside, mac_of(outside), request.param)


_RAW = [Capability.NET_RAW]


@pytest.mark.parametrize("flags", [SYN, ACK | PSH], ids=["opening", "mid-stream"])
def test_a_packet_written_by_a_raw_socket(setting: Setting, family: str, flags: int) -> None:
    """With an IP header of its own."""
    segment = setting.segment(family, flags)
    attack = partial(send_packets, [segment.packet()], segment.destination)
    setting.assert_judged(attack, _RAW, "raw")


def test_a_segment_written_by_a_raw_socket(setting: Setting, family: str) -> None:
    """A raw socket for TCP is what the kernel's own answers come from as well."""
    setting.assert_judged(partial(send_tcp, setting.segment(family)), _RAW, "raw")


def test_the_segment_of_a_raw_socket_that_opens_a_connection(setting: Setting, family: str) -> None:
    """A SYN without data would open one, were it let out."""
    segment = setting.segment(family, SYN, b"")
    with capturing(setting.outside) as capture:
        setting.a.run(send_tcp, segment, capabilities=_RAW)
    seen = [packet for packet in capture.packets if packet.ports == (4711, 80)]
    assert bool(seen) == (setting.mode == "count")
    assert setting.drops().counts["raw"] == 1


def test_fragments(setting: Setting, family: str) -> None:
    """Neither the first nor a later fragment of a segment leaves."""
    segment = setting.segment(family)
    parts = segment.fragments6() if family == "v6" else segment.fragments4()
    attack = partial(send_packets, list(parts), segment.destination)
    setting.assert_judged(attack, _RAW, "unreadable")


def test_a_fragment_that_hides_what_it_is(setting: Setting) -> None:
    """Receivers believe the first fragment only; a later one that names extension headers lies."""
    segment = setting.segment("v6")
    later = list(segment.fragments6(first_says=60))[1:]
    attack = partial(send_packets, later, segment.destination)
    setting.assert_judged(attack, _RAW, "unreadable")


def test_extension_headers(setting: Setting) -> None:
    """TCP behind a header of options is TCP."""
    segment = setting.segment("v6")
    attack = partial(send_packets, [segment.behind_options()], segment.destination)
    setting.assert_judged(attack, _RAW, "raw")


def test_more_extension_headers_than_anybody_follows(setting: Setting) -> None:
    """What cannot be read to its end is dropped."""
    segment = setting.segment("v6")
    attack = partial(send_packets, [segment.behind_many_options()], segment.destination)
    setting.assert_judged(attack, _RAW, "unreadable")


@pytest.mark.parametrize("dressed", ["plain", "as ARP", "tagged", "cooked"])
def test_a_frame_written_by_a_packet_socket(setting: Setting, family: str, dressed: str) -> None:
    """Whatever it tells the kernel that it is; its bytes count."""
    kind = _IPV6 if family == "v6" else _IPV4
    frame = {
        "plain": Frame(setting.mac, kind, kind),
        "as ARP": Frame(setting.mac, kind, _ARP),
        "tagged": Frame(setting.mac, kind, kind, tags=_TAG),
        "cooked": Frame(setting.mac, kind, kind, cooked=True),
    }[dressed]
    attack = partial(send_frames, frame, [setting.segment(family).packet()])
    setting.assert_judged(attack, _RAW, "raw")


@pytest.mark.parametrize("mark", [0x539, 0])
def test_a_mark_forged_on_a_captured_socket(setting: Setting, family: str, mark: int) -> None:
    """Once connected it is no more believed."""
    there = at(setting.outside, family)

    def attack() -> None:
        with socket.create_connection((there.ip, there.port), timeout=5) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            client.sendall(MARKER)
            client.settimeout(1)
            with pytest.raises(OSError):
                assert client.recv(100) == MARKER

    with serve(setting.outside):
        setting.assert_judged(attack, marking(setting.a), "captured")


def test_a_mark_forged_on_an_accepted_socket(setting: Setting, family: str) -> None:
    """The answer to a client outside would leave in the clear, by the device."""

    def server(channel) -> None:
        with socket.create_server(("::", 7070), family=socket.AF_INET6, dualstack_ipv6=True) as s:
            channel.send("listening")
            accepted, _ = s.accept()
            with accepted:
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0)
                accepted.sendall(MARKER)
                channel.receive()

    child = setting.a.spawn(server, capabilities=marking(setting.a))
    assert child.receive() == "listening"
    there = at(setting.a, family, 7070)

    def visit() -> None:
        with socket.create_connection((there.ip, there.port), timeout=5) as client:
            client.settimeout(1)
            with pytest.raises(OSError):
                client.recv(100)

    with capturing(setting.outside) as capture:
        setting.outside.run(visit)
    arrived = any(MARKER in frame for frame in capture.frames)
    assert (arrived, setting.drops().counts["socket"] > 0) == (setting.mode == "count", True)
