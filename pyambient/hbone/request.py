"""CONNECT requests and their answers as values, and which field lists make one.

A CONNECT has `:method` and `:authority` and no other pseudo-header (RFC 9113 section 8.5). What
the authority means is for upper layers; here it only has to be there. Fields that we do not know
are ignored, but a list that is malformed as such (section 8.2 and 8.3) is no request at all.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from .errors import ErrorCode, StreamError
from .headers import Fields, Headers, encode_request

# RFC 9113 section 8.2.1: names are tokens in lower case. Values have no control characters but
# tabs (RFC 9110 section 5.5), an authority no blanks and nothing outside ASCII either: both end up
# in log lines.
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_WELL_FORMED = re.compile(rb"(?:[^\0-\x20\x7f](?:[^\0-\x08\n-\x1f\x7f]*[^\0-\x20\x7f])?)?")
_AUTHORITY = re.compile(rb"[!-~]+")
# Section 8.2.2: these speak of the hop and do not exist in HTTP/2.
_CONNECTION_SPECIFIC = frozenset(
    (b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade")
)
# The fields of HBONE, as attributes of `ConnectRequest`.
_KNOWN = {
    b"baggage": "baggage",
    b"forwarded": "forwarded",
    b"traceparent": "traceparent",
    b"x-forwarded-network": "forwarded_network",
}


@dataclass(frozen=True, slots=True)
class ConnectRequest:
    """What a CONNECT says; all but the authority may be absent."""

    authority: str
    baggage: str | None = None
    forwarded: str | None = None
    traceparent: str | None = None
    forwarded_network: str | None = None

    def encode(self) -> bytes:
        """The header block."""
        return encode_request(
            self.authority,
            self.baggage,
            (
                ("forwarded", self.forwarded),
                ("traceparent", self.traceparent),
                ("x-forwarded-network", self.forwarded_network),
            ),
        )


def parse_request(fields: Fields) -> ConnectRequest:
    """The CONNECT that `fields` are; StreamError with the reason if they are none."""
    pseudo, regular = _split(fields)
    method = pseudo.pop(b":method", None)
    authority = pseudo.pop(b":authority", b"")
    if method != b"CONNECT":
        raise _malformed("the method is not CONNECT" if method else "the request has no method")
    if not authority:
        raise _malformed("the CONNECT has no authority")
    if pseudo:
        raise _malformed(f"a CONNECT must not have {_shown(next(iter(pseudo)))}")
    if not _AUTHORITY.fullmatch(authority):
        raise _malformed("the authority has forbidden characters")
    known: dict[str, str] = {}
    for name, value in regular:
        attribute = _KNOWN.get(name)
        if attribute is not None:
            text = _text(value)
            # Several fields of one name are one list (RFC 9110 section 5.3).
            known[attribute] = f"{known[attribute]},{text}" if attribute in known else text
    return ConnectRequest(_text(authority), **known)


@functools.lru_cache(maxsize=1024)
def parse_answer(fields: Fields) -> tuple[int, Headers]:
    """(status, regular fields); StreamError if they are no answer.

    Kept: a peer answers all connections to one workload alike.
    """
    pseudo, regular = _split(fields)
    status = pseudo.pop(b":status", b"")
    if len(status) != 3 or not status.isdigit() or pseudo:
        raise _malformed("the answer has no status or too many pseudo-headers")
    # HTTP/2 has no protocol switch (RFC 9113 section 8.6).
    if not 100 <= int(status) < 600 or status == b"101":
        raise _malformed(f"the answer has status {_shown(status)}")
    return int(status), tuple((_text(name), _text(value)) for name, value in regular)


def check_trailers(fields: Fields) -> None:
    """StreamError if `fields` cannot be trailers."""
    pseudo, _ = _split(fields)
    if pseudo:
        raise _malformed("pseudo-headers in trailers")


def _split(fields: Fields) -> tuple[dict[bytes, bytes], Fields]:
    """Pseudo-headers and regular fields, each of them well formed."""
    pseudo: dict[bytes, bytes] = {}
    regular: list[tuple[bytes, bytes]] = []
    for name, value in fields:
        if not _WELL_FORMED.fullmatch(value):
            raise _malformed(f"a value of {_shown(name)} has forbidden characters")
        if name[:1] != b":":
            if name not in _KNOWN:
                _check_name(name, value)
            regular.append((name, value))
        elif regular or name in pseudo:
            raise _malformed(f"{_shown(name)} stands twice or behind regular fields")
        else:
            pseudo[name] = value
    return pseudo, tuple(regular)


def _check_name(name: bytes, value: bytes) -> None:
    if not _NAME.fullmatch(name):
        raise _malformed(f"forbidden characters in the field name {_shown(name)!r}")
    if name in _CONNECTION_SPECIFIC or (name == b"te" and value != b"trailers"):
        raise _malformed(f"{_shown(name)} is of HTTP/1")


def _text(raw: bytes) -> str:
    """Whatever a peer sent, as text that can be logged and compared."""
    return raw.decode("utf-8", "backslashreplace")


def _shown(raw: bytes) -> str:
    """A piece of a malformed list, fit for a log line."""
    return ascii(_text(raw[:40]))[1:-1]


def _malformed(why: str) -> StreamError:
    return StreamError(ErrorCode.PROTOCOL_ERROR, why)
