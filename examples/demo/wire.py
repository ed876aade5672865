"""What passes on the wire: a capture by tcpdump, read back and judged.

General theory of operation
---------------------------
tcpdump, which knows nothing of pyambient, writes every frame that crosses the bridge to a file in
the classic pcap format; `Capture` reads the TCP segments out of it and puts the two directions of
each connection together again. A capture that misses frames would make every claim about them
true, so `Recorder.stop` first sends a datagram with known text across the bridge and waits until
the file holds it: the recorder was still seeing everything then.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyambient.errors import PyambientError
from pyambient.model.address import SocketAddress

from .patience import patience

_PATIENCE = patience(5.0)
_PCAP_MAGIC = b"\xd4\xc3\xb2\xa1"  # little-endian, microseconds
_FILE_HEADER = 24
_RECORD_HEADER = 16
_ETHERNET = 14
_TCP = 6
# TLS record types, RFC 8446 section 5.1, and 20 for middlebox compatibility (appendix D.4).
_RECORD_TYPES = frozenset((20, 21, 22, 23))
_MAX_RECORD = (1 << 14) + 256
APPLICATION_DATA = 23


@dataclass(frozen=True)
class Segment:
    """One TCP segment; `sequence` is that of its first byte, a SYN counts as one."""

    source: SocketAddress
    destination: SocketAddress
    sequence: int
    syn: bool
    payload: bytes


class Capture:
    """Every frame that was seen, and the TCP segments in them."""

    def __init__(self, content: bytes) -> None:
        """Read a pcap file's content."""
        self.frames = list(_frames(content))
        self.segments = [s for s in map(_segment, self.frames) if s is not None]

    def holds(self, text: str) -> bool:
        """Whether `text` can be read in any frame, or in any direction of any connection."""
        wanted = text.encode()
        streams = self.streams().values()
        return any(wanted in frame for frame in self.frames) or any(wanted in s for s in streams)

    def between(self, one: tuple[str, ...], other: tuple[str, ...]) -> list[Segment]:
        """The segments with payload that went from `one`'s IPs to `other`'s, or back."""
        ends = {(a, b) for a in one for b in other} | {(b, a) for a in one for b in other}
        return [s for s in self.segments if s.payload and (s.source.ip, s.destination.ip) in ends]

    def streams(self) -> dict[tuple[SocketAddress, SocketAddress], bytes]:
        """The payload of each direction of each connection, in order, retransmissions once."""
        parts: dict[tuple[SocketAddress, SocketAddress], list[Segment]] = {}
        for segment in self.segments:
            parts.setdefault((segment.source, segment.destination), []).append(segment)
        return {ends: _joined(segments) for ends, segments in parts.items()}

    def __repr__(self) -> str:
        return f"<Capture of {len(self.frames)} frames>"


def _frames(content: bytes) -> Iterator[bytes]:
    if content[:4] != _PCAP_MAGIC:
        raise PyambientError("tcpdump wrote no pcap file", "see its log in the demo's folder")
    at = _FILE_HEADER
    while at + _RECORD_HEADER <= len(content):
        (length,) = struct.unpack_from("<I", content, at + 8)
        at += _RECORD_HEADER
        yield content[at : at + length]
        at += length


def _segment(frame: bytes) -> Segment | None:
    """The TCP segment in an Ethernet frame of IPv4 or IPv6 without extension headers."""
    packet = frame[_ETHERNET:]
    kind = frame[12:14]
    if kind == b"\x08\x00" and packet[9] == _TCP:
        start = (packet[0] & 0xF) * 4
        (total,) = struct.unpack_from("!H", packet, 2)
        ends = packet[12:16], packet[16:20]
    elif kind == b"\x86\xdd" and packet[6] == _TCP:
        start = 40
        total = start + struct.unpack_from("!H", packet, 4)[0]
        ends = packet[8:24], packet[24:40]
    else:
        return None
    tcp = packet[start:total]
    ports = struct.unpack_from("!HH", tcp)
    (sequence,) = struct.unpack_from("!I", tcp, 4)
    source, destination = (
        SocketAddress(str(ipaddress.ip_address(ip)), port)
        for ip, port in zip(ends, ports, strict=True)
    )
    return Segment(source, destination, sequence, bool(tcp[13] & 2), tcp[(tcp[12] >> 4) * 4 :])


def _joined(segments: list[Segment]) -> bytes:
    """One direction's bytes; a gap ends it, as what follows cannot be placed."""
    base = next((s.sequence + 1 for s in segments if s.syn), segments[0].sequence)
    joined = bytearray()
    for segment in sorted(segments, key=lambda s: (s.sequence - base) & 0xFFFFFFFF):
        offset = (segment.sequence + segment.syn - base) & 0xFFFFFFFF
        if offset > len(joined):
            break
        joined += segment.payload[len(joined) - offset :]
    return bytes(joined)


def tls_records(stream: bytes) -> list[int]:
    """The types of the TLS records that `stream` consists of; ValueError if it is not TLS.

    The last record may be cut off by the end of the capture.
    """
    types = []
    at = 0
    while at + 5 <= len(stream):
        kind, version, length = struct.unpack_from("!BHH", stream, at)
        if kind not in _RECORD_TYPES or version not in (0x0301, 0x0303) or length > _MAX_RECORD:
            raise ValueError(f"byte {at} starts no TLS record: {stream[at : at + 16]!r}")
        types.append(kind)
        at += 5 + length
    return types


class Recorder:
    """A running tcpdump on `device`, writing to `path` (`.pcap`, which Debian's profile wants)."""

    def __init__(self, device: str, path: Path) -> None:
        self._path = path
        command = ["tcpdump", "-n", "-i", device, "-U", "--immediate-mode", "-Z", "root"]
        self._process = subprocess.Popen(
            [*command, "-w", path], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        # The file's header is written once the capture is on.
        self._wait(lambda content: len(content) >= _FILE_HEADER)

    def stop(self, send: Callable[[str], object]) -> Capture:
        """End the capture and return it; `send` puts a given text on the wire."""
        text = f"end of capture {secrets.token_hex(8)}"
        send(text)
        content = self._wait(lambda content: text.encode() in content)
        self.close()
        return Capture(content)

    def close(self) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=_PATIENCE)

    def _wait(self, arrived: Callable[[bytes], bool]) -> bytes:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            content = self._path.read_bytes() if self._path.exists() else b""
            if arrived(content):
                return content
            time.sleep(0.02)
        self.close()
        raise PyambientError("tcpdump does not record the bridge", "run tcpdump by hand")

    def __repr__(self) -> str:
        return f"<Recorder to {self._path}>"
