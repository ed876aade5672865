"""Header blocks: HPACK (RFC 7541) as far as a CONNECT needs it.

Decoding goes through the connection's one `hpack.Decoder`, every block in order, also those whose
stream is gone: peers use the dynamic table, a real ztunnel does in its answers. Only a block that
has nothing to do with that table is read without it.

Encoding never touches the dynamic table. Every field is a literal without indexing or a reference
to the static table, so a block is the same bytes on every connection and its constant part can be
cached. The first block of a connection begins with a table size update to 0, which makes that
official: a peer may then shrink SETTINGS_HEADER_TABLE_SIZE as it likes (RFC 7541 section 4.2).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import hpack

from .errors import ErrorCode, RemoteProtocolError

Fields = tuple[tuple[bytes, bytes], ...]
"""Decoded fields as they came: names and values in bytes."""
Headers = tuple[tuple[str, str], ...]
"""Regular header fields for people and upper layers, names in lower case."""

NO_DYNAMIC_TABLE = b"\x20"
_CONTINUATIONS_MAX = 32

# Literals without indexing: the name by its index in the static table, or spelled out.
_AUTHORITY = b"\x01"
_METHOD_CONNECT = b"\x02\x07CONNECT"
_STATUS = b"\x08"
_NEW_NAME = b"\x00"
# RFC 7541 appendix A has these whole.
_STATUS_INDEXED = {200: b"\x88", 204: b"\x89", 400: b"\x8c", 404: b"\x8d", 500: b"\x8e"}
_STATIC_WHOLE = {
    encoded[0]: (b":status", b"%03d" % status) for status, encoded in _STATUS_INDEXED.items()
}
_STATIC_NAMES = {1: b":authority", 2: b":method", 8: b":status"}
# What RFC 9113 section 6.5.2 counts for a field beside its bytes.
_ENTRY_OVERHEAD = 32
_STATUS_SIZE = len(b":status") + 3 + _ENTRY_OVERHEAD


def _string(value: bytes) -> bytes:
    """A string literal, not Huffman coded (RFC 7541 sections 5.1 and 5.2)."""
    length = len(value)
    if length < 0x7F:
        return bytes((length,)) + value
    prefix = bytearray((0x7F,))
    length -= 0x7F
    while length >= 0x80:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + value


def encode_field(name: str, value: str) -> bytes:
    """One regular field, as a literal."""
    return _NEW_NAME + _string(name.encode("ascii")) + _string(value.encode())


@functools.lru_cache(maxsize=4096)
def _request_start(authority: str, baggage: str | None) -> bytes:
    start = _METHOD_CONNECT + _AUTHORITY + _string(authority.encode())
    return start if baggage is None else start + encode_field("baggage", baggage)


def encode_request(
    authority: str, baggage: str | None, others: Iterable[tuple[str, str | None]]
) -> bytes:
    """The block of a CONNECT (RFC 9113 section 8.5); fields that are None are left out.

    The part up to the baggage is cached: it is the same for all connections of a workload.
    """
    varying = [encode_field(name, value) for name, value in others if value is not None]
    return b"".join((_request_start(authority, baggage), *varying))


@functools.lru_cache(maxsize=1024)
def encode_answer(status: int, headers: Headers) -> bytes:
    """The block of an answer."""
    indexed = _STATUS_INDEXED.get(status)
    start = _STATUS + _string(b"%03d" % status) if indexed is None else indexed
    return start + b"".join(encode_field(name, value) for name, value in headers)


@functools.lru_cache(maxsize=1024)
def _stateless(block: bytes, max_list: int) -> Fields | None:
    """The fields of a block that neither reads nor changes the dynamic table, as ours all are.

    None for any other, and for whatever is unusual: that is for the HPACK decoder to judge. A
    block that leaves the table alone may be decoded beside it, in a fifth of the time, or in none
    if it came before, as the answers of one peer do.
    """
    fields: list[tuple[bytes, bytes]] = []
    position, end, left = 0, len(block), max_list
    try:
        while position < end:
            first = block[position]
            position += 1
            if first > 0x80:
                fields.append(_STATIC_WHOLE[first])
                left -= _STATUS_SIZE
                continue
            if first:
                name = _STATIC_NAMES[first]
            else:
                position, name = _short_string(block, position)
            position, value = _short_string(block, position)
            left -= len(name) + len(value) + _ENTRY_OVERHEAD
            fields.append((name, value))
    except (KeyError, IndexError):
        return None
    return tuple(fields) if position == end and left >= 0 else None


def _short_string(block: bytes, position: int) -> tuple[int, bytes]:
    """Where a string ends, and the string; KeyError if it is Huffman coded or cut off.

    The length is a prefix of seven bits, and at most two bytes behind it.
    """
    length = block[position]
    position += 1
    if length >= 0x7F:
        if length != 0x7F:
            raise KeyError(length)
        length += block[position] & 0x7F
        if block[position] & 0x80:
            position += 1
            length += block[position] << 7
            if block[position] & 0x80:
                raise KeyError(length)
        position += 1
    after = position + length
    return after, block[position:after]


class HeaderBlock:
    """A header block on its way in: a HEADERS frame and the CONTINUATIONs behind it."""

    __slots__ = ("_continuations", "_limit", "fragments", "stream_id", "with_end")

    def __init__(self, stream_id: int, limit: int, *, with_end: bool) -> None:
        """`limit` bounds the block in bytes; `with_end`: its HEADERS had END_STREAM."""
        self.stream_id = stream_id
        self.with_end = with_end
        self.fragments = bytearray()
        self._limit = limit
        self._continuations = -1

    def add(self, fragment: memoryview) -> None:
        """Append a fragment. Empty ones count too (CVE-2024-27316)."""
        self.fragments += fragment
        self._continuations += 1
        if len(self.fragments) > self._limit or self._continuations > _CONTINUATIONS_MAX:
            raise RemoteProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "endless header block")


class FieldDecoder:
    """The connection's one HPACK decoder."""

    __slots__ = ("_decoder", "_max_list")

    def __init__(self, max_list: int) -> None:
        """`max_list` bounds the decoded list, counted as in RFC 9113 section 6.5.2."""
        self._decoder = hpack.Decoder(max_header_list_size=max_list)
        self._max_list = max_list

    def decode(self, block: bytes) -> Fields:
        """The fields of a whole block; after an error the table is unusable."""
        fields = _stateless(block, self._max_list)
        if fields is not None:
            return fields
        try:
            return tuple(self._decoder.decode(block, raw=True))
        except hpack.OversizedHeaderListError as error:
            raise RemoteProtocolError(ErrorCode.ENHANCE_YOUR_CALM, str(error)) from None
        except hpack.HPACKError:
            # hpack's own text can name an address of our memory, and this one goes to the peer.
            raise RemoteProtocolError(
                ErrorCode.COMPRESSION_ERROR, "malformed header block"
            ) from None
