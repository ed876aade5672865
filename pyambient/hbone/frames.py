"""Frames as they are on the wire (RFC 9113 sections 4.1 and 6).

Reading needs only the header's layout, because payloads are used where they lie. Writing makes
whole control frames as bytes; DATA has its header packed in front of a payload that is in the
output already.
"""

from __future__ import annotations

import struct
from typing import Final

from .errors import ErrorCode, RemoteProtocolError

DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9
# Types above this one are extensions, to be ignored (RFC 9113 section 5.5).
LAST_TYPE: Final = CONTINUATION

NAMES: Final = (
    "DATA",
    "HEADERS",
    "PRIORITY",
    "RST_STREAM",
    "SETTINGS",
    "PUSH_PROMISE",
    "PING",
    "GOAWAY",
    "WINDOW_UPDATE",
    "CONTINUATION",
)

ACK: Final = 0x1
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
WITH_PRIORITY: Final = 0x20

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_SIZE: Final = 9
# The highest stream id and the largest window; the bit above is reserved in both fields.
MAX_31_BITS: Final = (1 << 31) - 1
DEFAULT_WINDOW: Final = 65535
DEFAULT_MAX_FRAME: Final = 16384

# Length (24 bits) as 16 + 8, type, flags, stream id.
_HEADER: Final = struct.Struct(">HBBBL")
header_from = _HEADER.unpack_from
pack_header_into = _HEADER.pack_into
u32_from = struct.Struct(">L").unpack_from
_U32_PAIR: Final = struct.Struct(">LL")
_HEADER_AND_U32: Final = struct.Struct(">HBBBLL")

# RFC 9113 sections 6.3, 6.4, 6.7 and 6.9: any other length is a FRAME_SIZE_ERROR.
_FIXED_SIZES: Final = {PRIORITY: 5, RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}
# A SETTINGS frame has room for 170,000 settings (there are seven, and peers grease with a few), a
# GOAWAY for any length of text.
_SANE_SIZES: Final = {SETTINGS: 6 * 64, GOAWAY: 16 << 10}
_OF_THE_CONNECTION: Final = frozenset((SETTINGS, PING, GOAWAY))


def name(kind: int) -> str:
    """The frame type for people."""
    return NAMES[kind] if kind < len(NAMES) else f"type {kind:#x}"


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One whole frame."""
    length = len(payload)
    return _HEADER.pack(length >> 8, length & 0xFF, kind, flags, stream_id) + payload


def window_update(stream_id: int, increment: int) -> bytes:
    return _HEADER_AND_U32.pack(0, 4, WINDOW_UPDATE, 0, stream_id, increment)


def rst_stream(stream_id: int, code: int) -> bytes:
    return _HEADER_AND_U32.pack(0, 4, RST_STREAM, 0, stream_id, code)


def goaway(last_stream_id: int, code: int, text: str = "") -> bytes:
    """GOAWAY; `text` is for the operator of the other side."""
    debug = text.encode("ascii", "replace")[:128]
    return frame(GOAWAY, 0, 0, _U32_PAIR.pack(last_stream_id, code) + debug)


def parse_goaway(payload: memoryview) -> tuple[int, int]:
    """(last stream id, error code)."""
    last_stream_id, code = _U32_PAIR.unpack_from(payload)
    return last_stream_id & MAX_31_BITS, code


def check_header(kind: int, flags: int, stream_id: int, length: int) -> None:
    """Judge a control frame by its header, before its payload is waited for."""
    if (stream_id == 0) is not (kind in _OF_THE_CONNECTION) and kind != WINDOW_UPDATE:
        raise RemoteProtocolError(
            ErrorCode.PROTOCOL_ERROR, f"{name(kind)} frame on stream {stream_id}"
        )
    if _wrong_size(kind, flags, length):
        raise RemoteProtocolError(
            ErrorCode.FRAME_SIZE_ERROR, f"{name(kind)} frame of {length} bytes"
        )
    if length > _SANE_SIZES.get(kind, length):
        raise RemoteProtocolError(
            ErrorCode.ENHANCE_YOUR_CALM, f"{name(kind)} frame of {length} bytes"
        )


def _wrong_size(kind: int, flags: int, length: int) -> bool:
    if kind == SETTINGS:
        return length != 0 if flags & ACK else length % 6 != 0
    if kind == GOAWAY:
        return length < 8
    return length != _FIXED_SIZES.get(kind, length)


def header_fragment(flags: int, payload: memoryview) -> memoryview:
    """The header block fragment of a HEADERS frame, without padding and priority."""
    first, last = 0, len(payload)
    padding = 0
    needed = (1 if flags & PADDED else 0) + (5 if flags & WITH_PRIORITY else 0)
    if last < needed:
        raise RemoteProtocolError(ErrorCode.FRAME_SIZE_ERROR, f"HEADERS frame of {last} bytes")
    if flags & PADDED:
        padding = payload[0]
    first = needed
    if padding > last - first:
        raise RemoteProtocolError(
            ErrorCode.PROTOCOL_ERROR, "HEADERS frame with padding longer than the frame"
        )
    return payload[first : last - padding]
