"""Packets that an app writes itself: what raw and packet sockets let it put on the wire."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from pyambient.model.address import SocketAddress

SYN, RST, PSH, ACK = 0x02, 0x04, 0x08, 0x10
MORE_FRAGMENTS = 0x2000
_SOL_PACKET = 263
_PACKET_QDISC_BYPASS = 20
_IPPROTO_FRAGMENT, _IPPROTO_DSTOPTS = 44, 60
_SOURCE = bytes.fromhex("02000000 0099")
_EIGHT_BYTES_OF_PADDING = bytes([1, 4, 0, 0, 0, 0])


@dataclass(frozen=True, slots=True)
class Forged:
    """A TCP segment, or what looks like one, from `source` to `destination`."""

    protocol: ClassVar[int] = socket.IPPROTO_TCP
    header_size: ClassVar[int] = 20

    source: SocketAddress
    destination: SocketAddress
    flags: int = ACK | PSH
    payload: bytes = b""

    @property
    def transport(self) -> bytes:
        ports = struct.pack("!HH", self.source.port, self.destination.port)
        rest = struct.pack("!IIBBHHH", 7, 7, 5 << 4, self.flags, 1024, 0, 0)
        header = ports + rest
        checksum = struct.pack("!H", _checksum(self._pseudo_header() + header + self.payload))
        return header[:16] + checksum + header[18:] + self.payload

    def packet(self, *, fragment: int = 0) -> bytes:
        """With its IPv4 or IPv6 header; `fragment` is the field of that name of IPv4's."""
        if self.destination.is_ipv6:
            return self.ipv6(self.protocol, self.transport)
        return self.ipv4(self.protocol, self.transport, fragment)

    def ipv4(self, protocol: int, data: bytes, fragment: int = 0) -> bytes:
        ips = socket.inet_aton(self.source.ip) + socket.inet_aton(self.destination.ip)
        head = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(data), 9, fragment, 64, protocol)
        checksum = struct.pack("!H", _checksum(head + b"\0\0" + ips))
        return head + checksum + ips + data

    def ipv6(self, protocol: int, data: bytes) -> bytes:
        return struct.pack("!IHBB", 6 << 28, len(data), protocol, 64) + self._ips6() + data

    def behind_options(self) -> bytes:
        """Its IPv6 packet with a header of destination options ahead of TCP."""
        options = bytes([self.protocol, 0]) + _EIGHT_BYTES_OF_PADDING
        return self.ipv6(_IPPROTO_DSTOPTS, options + self.transport)

    def behind_many_options(self) -> bytes:
        """The same with more such headers than anybody needs."""
        first = (bytes([_IPPROTO_DSTOPTS, 0]) + _EIGHT_BYTES_OF_PADDING) * 9
        last = bytes([self.protocol, 0]) + _EIGHT_BYTES_OF_PADDING
        return self.ipv6(_IPPROTO_DSTOPTS, first + last + self.transport)

    def fragments6(self, first_says: int | None = None) -> Iterable[bytes]:
        """Its IPv6 packet in two fragments; the header of the later one says `first_says`."""
        data, says = self.transport, self.protocol if first_says is None else first_says
        return self._fragments6(data, self.protocol, says, size=24)

    def fragments6_behind_options(self) -> Iterable[bytes]:
        """The same with a header of options in the first fragment, and nothing else in there."""
        options = bytes([self.protocol, 0]) + _EIGHT_BYTES_OF_PADDING
        data = options + self.transport
        return self._fragments6(data, _IPPROTO_DSTOPTS, _IPPROTO_DSTOPTS, size=len(options))

    def _fragments6(self, data: bytes, first: int, later: int, *, size: int) -> Iterable[bytes]:
        for offset, more, says in ((0, 1, first), (size, 0, later)):
            header = struct.pack("!BBHI", says, 0, offset | more, 77)
            yield self.ipv6(_IPPROTO_FRAGMENT, header + (data[:size] if more else data[size:]))

    def fragments4(self) -> Iterable[bytes]:
        """Its IPv4 packet in two fragments."""
        yield self.ipv4(self.protocol, self.transport[:24], MORE_FRAGMENTS)
        yield self.ipv4(self.protocol, self.transport[24:], 24 // 8)

    def _ips6(self) -> bytes:
        ends = (self.source.ip, self.destination.ip)
        return b"".join(socket.inet_pton(socket.AF_INET6, ip) for ip in ends)

    def _pseudo_header(self) -> bytes:
        size = self.header_size + len(self.payload)
        if self.destination.is_ipv6:
            return self._ips6() + struct.pack("!II", size, self.protocol)
        ips = socket.inet_aton(self.source.ip) + socket.inet_aton(self.destination.ip)
        return ips + struct.pack("!HH", self.protocol, size)


class Datagram(Forged):
    """A UDP datagram; it has no flags."""

    protocol: ClassVar[int] = socket.IPPROTO_UDP
    header_size: ClassVar[int] = 8

    @property
    def transport(self) -> bytes:
        size = self.header_size + len(self.payload)
        header = struct.pack("!HHHH", self.source.port, self.destination.port, size, 0)
        checksum = _checksum(self._pseudo_header() + header + self.payload) or 0xFFFF
        return header[:6] + struct.pack("!H", checksum) + self.payload


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def send_packets(packets: Iterable[bytes], destination: SocketAddress) -> None:
    """By a raw IP socket, headers included. Runs in a pod; needs CAP_NET_RAW."""
    with socket.socket(destination.family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for packet in packets:
            _send(raw, packet, SocketAddress(destination.ip, 0).sockaddr())


def send_tcp(segment: Forged) -> None:
    """By a raw socket for TCP, to which the kernel adds the IP header. Runs in a pod."""
    destination = segment.destination
    with socket.socket(destination.family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        _send(raw, segment.transport, SocketAddress(destination.ip, 0).sockaddr())


@dataclass(frozen=True, slots=True)
class Frame:
    """How a packet is dressed for a packet socket; `says` is the protocol told to the kernel.

    `cooked`: the kernel adds the Ethernet header (SOCK_DGRAM).
    """

    to: bytes
    type: int
    says: int
    tags: bytes = b""
    cooked: bool = False

    def bytes(self, packet: bytes) -> bytes:
        if self.cooked:
            return packet
        return self.to + _SOURCE + self.tags + struct.pack("!H", self.type) + packet


def send_frames(frame: Frame, packets: Iterable[bytes], *, bypass: bool = False) -> None:
    """By a packet socket, out of eth0. Runs in a pod; needs CAP_NET_RAW."""
    kind = socket.SOCK_DGRAM if frame.cooked else socket.SOCK_RAW
    with socket.socket(socket.AF_PACKET, kind, 0) as sender:
        if bypass:
            sender.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
        for packet in packets:
            _send(sender, frame.bytes(packet), ("eth0", frame.says, 0, 0, frame.to))


def _send(sender: socket.socket, data: bytes, to: tuple[Any, ...]) -> None:
    """That the kernel has dropped it (by tc ENOBUFS, by nf_tables EPERM) is what it is sent for."""
    try:
        sender.sendto(data, to)
    except OSError as error:
        if error.errno not in (errno.ENOBUFS, errno.EPERM):
            raise
