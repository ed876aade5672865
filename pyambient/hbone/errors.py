"""Whose fault it was, and how far it reaches.

`LocalProtocolError`: the caller broke the rules; nothing was sent. `RemoteProtocolError`: the peer
did, in a way that costs it the connection (RFC 9113 section 5.4.1). `StreamError` never leaves
this package: the peer's mistake costs it one stream (section 5.4.2).
"""

from __future__ import annotations

import enum


class ErrorCode(enum.IntEnum):
    """RFC 9113 section 7. A peer may send any other 32-bit number, which is passed on as an int."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class LocalProtocolError(Exception):
    """The caller asked for something that HTTP/2 or the state of the stream forbids."""


class RemoteProtocolError(Exception):
    """The peer broke the protocol; the connection is over and a GOAWAY with `code` is queued."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text

    def __str__(self) -> str:
        return f"{self.text} ({self.code.name})"


class StreamError(Exception):
    """The peer broke the protocol on one stream, which is reset with `code`."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text
