"""What really went over a wire: a sniffer on a veth, in a process of its own."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from pyambient.model.address import SocketAddress, canonical_ip

from .network import BedPod
from .process import Channel, Child

_ETH_P_ALL = 0x0003
_ETH_IPV4, _ETH_IPV6 = 0x0800, 0x86DD
_SO_RCVBUFFORCE = 33
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_BUFFER = 64 << 20
_MAX_BYTES = 256 << 20
_TCP, _UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
_SHORTEST = {_TCP: 20, _UDP: 8}
TCP_SYN, TCP_RST, TCP_ACK = 0x02, 0x04, 0x10


@dataclass(frozen=True, slots=True)
class Packet:
    """One TCP or UDP packet; offloads make it up to 64 KiB long. `flags` are TCP's, or 0."""

    protocol: int
    source: SocketAddress
    destination: SocketAddress
    flags: int
    payload: bytes

    @property
    def ports(self) -> tuple[int, int]:
        return self.source.port, self.destination.port

    @property
    def speaks(self) -> bool:
        """It opens or carries something; the kernel's bare answers do not (docs/security.md)."""
        return bool(self.payload or self.flags & TCP_SYN or self.protocol == _UDP)

    def __str__(self) -> str:
        kind = "tcp" if self.protocol == _TCP else "udp"
        flags = f" flags {self.flags:#04x}" if self.flags else ""
        return f"{kind} {self.source} > {self.destination}{flags} {len(self.payload)} bytes"


class Capture:
    """A running capture of all that enters or leaves `pod` by `device`; `stop` gives the packets.

    It watches the node's end of the veth: no process of ours is in the pod's namespace, and what
    an app hides from its own end (PACKET_QDISC_BYPASS) still passes here.
    """

    def __init__(self, pod: BedPod, device: str = "eth0") -> None:
        self.packets: list[Packet] = []
        self.frames: list[bytes] = []
        node = pod.bed.node
        self._child: Child = node.spawn(_sniff, pod.veths[device], uid=0, gid=0)
        assert self._child.receive() == "capturing"

    def stop(self) -> list[Packet]:
        """All TCP and UDP packets since the start; fails if the kernel had to drop one."""
        self._child.send("stop")
        frames, dropped = self._child.wait()
        assert dropped == 0, f"the capture lost {dropped} packets"
        self.frames = frames
        self.packets = [packet for frame in frames if (packet := parse(frame)) is not None]
        return self.packets


@contextlib.contextmanager
def capturing(pod: BedPod, device: str = "eth0") -> Iterator[Capture]:
    """Capture during the block; `capture.packets` and `.frames` are there after it."""
    capture = Capture(pod, device)
    yield capture
    capture.stop()


def _sniff(channel: Channel, device: str) -> tuple[list[bytes], int]:
    frames: list[bytes] = []
    total = 0
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    with sniffer, selectors.DefaultSelector() as ready:
        sniffer.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        sniffer.bind((device, _ETH_P_ALL))
        sniffer.setblocking(False)
        ready.register(sniffer, selectors.EVENT_READ)
        ready.register(channel, selectors.EVENT_READ)
        channel.send("capturing")
        stopping = False
        while not stopping:
            stopping = any(key.fileobj is channel for key, _ in ready.select())
            with contextlib.suppress(BlockingIOError):
                while True:
                    frames.append(sniffer.recv(_MAX_FRAME))
                    total += len(frames[-1])
                    assert total < _MAX_BYTES, "too much for a capture; narrow the test"
        _, dropped = struct.unpack("II", sniffer.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
    return frames, dropped


_MAX_FRAME = 1 << 17


def parse(frame: bytes) -> Packet | None:
    """The TCP or UDP packet in an Ethernet frame; None for anything else."""
    (kind,) = struct.unpack_from("!H", frame, 12)
    if kind == _ETH_IPV4:
        return _parse_ipv4(frame[14:])
    if kind == _ETH_IPV6:
        return _parse_ipv6(frame[14:])
    return None


def _parse_ipv4(packet: bytes) -> Packet | None:
    header = (packet[0] & 15) * 4
    (total,) = struct.unpack_from("!H", packet, 2)
    # A segment that offloading made longer than 64 KiB carries length 0.
    data = packet[header : total or None]
    source = socket.inet_ntop(socket.AF_INET, packet[12:16])
    destination = socket.inet_ntop(socket.AF_INET, packet[16:20])
    return _parse_transport(packet[9], source, destination, data)


def _parse_ipv6(packet: bytes) -> Packet | None:
    (length,) = struct.unpack_from("!H", packet, 4)
    data = packet[40 : 40 + length if length else None]
    source = socket.inet_ntop(socket.AF_INET6, packet[8:24])
    destination = socket.inet_ntop(socket.AF_INET6, packet[24:40])
    return _parse_transport(packet[6], source, destination, data)


def _parse_transport(protocol: int, source: str, destination: str, data: bytes) -> Packet | None:
    if protocol not in (_TCP, _UDP) or len(data) < _SHORTEST[protocol]:
        return None
    ports = struct.unpack_from("!HH", data)
    header = (data[12] >> 4) * 4 if protocol == _TCP else 8
    flags = data[13] if protocol == _TCP else 0
    return Packet(
        protocol,
        SocketAddress(canonical_ip(source), ports[0]),
        SocketAddress(canonical_ip(destination), ports[1]),
        flags,
        data[header:],
    )
