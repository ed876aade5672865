"""DNS messages on the wire (RFC 1035 section 4), as far as a forwarder looks into them.

A forwarder passes messages on as they came, EDNS options and the case of names included. It reads
the header, the extent of the question section and the OPT record (RFC 6891); it writes the id,
the answers it has to give itself, and what is left of an answer that does not fit. Names are
skipped, never decoded. Every loop advances through the message, so its length bounds all work.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

HEADER_SIZE: Final = 12
# What every client takes over UDP (RFC 1035 section 4.2.1), and what we say we take (RFC 6891
# section 6.2.5 wants no fragments; 1232 is what DNS flag day 2020 made of it).
MIN_UDP_SIZE: Final = 512
# What is no longer passes any link in one packet, of IPv6 as well: RFC 8200 section 5.
ANY_LINK_UDP_SIZE: Final = 1232
LARGEST: Final = 0xFFFF

FORMERR: Final = 1
SERVFAIL: Final = 2
NOTIMP: Final = 4
REFUSED: Final = 5

# The third and fourth byte: QR, opcode, AA, TC, RD and RA, Z, AD, CD, RCODE.
_QR: Final = 0x80
_OPCODE: Final = 0x78
_TC: Final = 0x02
_RD: Final = 0x01
_RA: Final = 0x80
_CD: Final = 0x10
_RCODE: Final = 0x0F

_COUNTS: Final = struct.Struct("!HHHH")
_RECORD: Final = struct.Struct("!HHIH")  # type, class, TTL, length of the data
_OPTION: Final = struct.Struct("!HHH")  # code, length, then an extended error's own code
_OPT_TYPE: Final = 41
_DNSSEC_OK: Final = 0x8000
_EXTENDED_ERROR: Final = 15
_NETWORK_ERROR: Final = 23
_TRANSFERS: Final = (b"\0\xfb", b"\0\xfc")  # IXFR, AXFR
_NAME_MAX: Final = 255
_LABEL_MAX: Final = 63
_POINTER: Final = 0xC0


class MalformedQueryError(Exception):
    """Bytes that are no query. `answer` is what to say to them; empty: say nothing."""

    def __init__(self, answer: bytes) -> None:
        super().__init__()
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Query:
    """One query: all of it, and its question section as it stands there."""

    message: bytes
    question: bytes

    @property
    def id(self) -> bytes:
        """The two bytes that its answer has to bear."""
        return self.message[:2]

    @property
    def is_transfer(self) -> bool:
        """Whether one query may have many answers (RFC 5936, RFC 1995), which TCP carries alone."""
        return self.question[-4:-2] in _TRANSFERS

    def udp_size(self) -> int:
        """The longest answer that the client takes over UDP (RFC 6891 section 6.2.3)."""
        opt = _opt_record(self.message)
        return max(MIN_UDP_SIZE, _RECORD.unpack_from(opt, 1)[1]) if opt else MIN_UDP_SIZE


def parse_query(message: bytes) -> Query:
    """The query in `message`; MalformedQueryError if there is none.

    A response is no query and gets no answer, or two servers could talk for ever. One question at
    most (RFC 9619); none at all is a query for a cookie (RFC 7873 section 5.4).
    """
    if len(message) < HEADER_SIZE or message[2] & _QR:
        raise MalformedQueryError(b"")
    count = int.from_bytes(message[4:6])
    if count > 1:
        raise MalformedQueryError(_format_error(message))
    try:
        end = _question_end(message) if count else HEADER_SIZE
    except (IndexError, ValueError):
        raise MalformedQueryError(_format_error(message)) from None
    return Query(message, message[HEADER_SIZE:end])


def _question_end(message: bytes) -> int:
    """Where the only question ends. There is no name before it that a pointer could mean."""
    name_end = _name_end(message, HEADER_SIZE, pointers=False)
    if name_end - HEADER_SIZE > _NAME_MAX:
        raise ValueError("a name that is too long")
    end = name_end + 4
    if end > len(message):
        raise IndexError("the question ends too early")
    return end


def _name_end(message: bytes, at: int, *, pointers: bool = True) -> int:
    """Where the name at `at` ends: after its root label, or after a pointer.

    IndexError or ValueError if it does not end, or is none.
    """
    while length := message[at]:
        if length >= _POINTER and pointers:
            return at + 2
        if length > _LABEL_MAX:
            raise ValueError("no such kind of label")
        at += 1 + length
    return at + 1


def _opt_record(message: bytes) -> bytes:
    """The OPT record; empty if there is none, or broken records before it."""
    questions, *others = _COUNTS.unpack_from(message, 4)
    at = HEADER_SIZE
    try:
        for _ in range(questions):
            at = _name_end(message, at) + 4
        for _ in range(sum(others)):
            start, at = at, _name_end(message, at)
            kind, _, _, length = _RECORD.unpack_from(message, at)
            at += _RECORD.size + length
            if kind == _OPT_TYPE and not message[start] and at <= len(message):
                return message[start:at]
    except (IndexError, ValueError, struct.error):
        pass
    return b""


def is_answer(query: Query, upstream_id: bytes, message: bytes) -> bool:
    """Whether `message` answers `query`, which was sent on as `upstream_id`.

    The question must come back byte for byte, the case of its letters included (RFC 5452 section
    9.1). A resolver that cannot read a query may leave it out, and so may the answer to an update
    (RFC 2136 section 3.8); then a forger gains an error at most.
    """
    if len(message) < HEADER_SIZE or message[:2] != upstream_id or not message[2] & _QR:
        return False
    asked = query.message
    if (message[2] ^ asked[2]) & _OPCODE:
        return False
    if message[4:6] == asked[4:6]:
        return message.startswith(query.question, HEADER_SIZE)
    if message[4:6] != b"\0\0":
        return False
    return bool(message[2] & _OPCODE) or message[3] & _RCODE in (FORMERR, NOTIMP)


def fitting(query: Query, answer: bytes, most: int = LARGEST) -> bytes:
    """`answer` if the client takes that much over UDP, else header, question and OPT with TC set.

    The client asks again over TCP (RFC 2181 section 9, RFC 6891 section 7). `most` is what the way
    there takes.
    """
    if len(answer) <= MIN_UDP_SIZE or len(answer) <= (size := min(most, query.udp_size())):
        return answer
    opt = _opt_record(answer)
    question = query.question if answer[5] else b""
    if HEADER_SIZE + len(question) + len(opt) > size:
        opt = b""
    counts = _COUNTS.pack(bool(question), 0, 0, bool(opt))
    return answer[:2] + bytes((answer[2] | _TC, answer[3])) + counts + question + opt


def failure(query: Query, code: int, reason: str) -> bytes:
    """An answer of our own; where the client speaks EDNS, `reason` goes with it (RFC 8914)."""
    asked = query.message
    opt = _own_opt(_opt_record(asked), reason)
    flags = bytes((_QR | asked[2] & (_OPCODE | _RD), _RA | asked[3] & _CD | code))
    counts = _COUNTS.pack(bool(query.question), 0, 0, bool(opt))
    return query.id + flags + counts + query.question + opt


def _own_opt(theirs: bytes, reason: str) -> bytes:
    """The OPT record that answers the client's; its bit DO comes back (RFC 3225 section 3)."""
    if not theirs:
        return b""
    text = reason.encode()
    option = _OPTION.pack(_EXTENDED_ERROR, 2 + len(text), _NETWORK_ERROR) + text
    ttl = _RECORD.unpack_from(theirs, 1)[2] & _DNSSEC_OK
    return b"\0" + _RECORD.pack(_OPT_TYPE, ANY_LINK_UDP_SIZE, ttl, len(option)) + option


def _format_error(message: bytes) -> bytes:
    """FORMERR for what has a header and no more that can be read."""
    flags = bytes((_QR | message[2] & (_OPCODE | _RD), _RA | FORMERR))
    return message[:2] + flags + _COUNTS.pack(0, 0, 0, 0)
