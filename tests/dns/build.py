"""DNS messages for tests, written out by hand: what is under test must not have made them."""

from __future__ import annotations

import struct

A, IXFR, AXFR, OPT = 1, 251, 252, 41
QR, RD, RA, TC = 0x8000, 0x0100, 0x0080, 0x0200


def name(text: str) -> bytes:
    labels = [label.encode() for label in text.split(".") if label]
    return b"".join(bytes((len(label),)) + label for label in labels) + b"\0"


def question(text: str = "www.Example.COM", kind: int = A) -> bytes:
    return name(text) + struct.pack("!HH", kind, 1)


def opt(size: int, options: bytes = b"", flags: int = 0) -> bytes:
    """An OPT record of a client or server that takes `size` bytes over UDP."""
    return b"\0" + struct.pack("!HHIH", OPT, size, flags, len(options)) + options


def message(
    ident: int | bytes,
    flags: int,
    questions: bytes = b"",
    answers: tuple[bytes, ...] = (),
    additional: tuple[bytes, ...] = (),
) -> bytes:
    number = ident if isinstance(ident, int) else int.from_bytes(ident)
    counts = (bool(questions), len(answers), 0, len(additional))
    return (
        struct.pack("!6H", number, flags, *counts) + questions + b"".join((*answers, *additional))
    )


def query(ident: int = 0x1234, text: str = "www.Example.COM", edns: int = 0) -> bytes:
    return message(ident, RD, question(text), additional=(opt(edns),) if edns else ())


def address_record(ip: bytes = b"\x0a\0\0\x01", padding: int = 0) -> bytes:
    """An A record of the name in the question, which a pointer stands for; `padding` is data."""
    data = ip + bytes(padding)
    return b"\xc0\x0c" + struct.pack("!HHIH", A, 1, 60, len(data)) + data


def answer_to(asked: bytes, *, padding: int = 0, flags: int = RA, more: bytes = b"") -> bytes:
    """A good answer to a query with one question; `more` is an OPT record for its end."""
    end = asked.index(b"\0", 12) + 5
    additional = (more,) if more else ()
    return message(
        asked[:2], QR | RD | flags, asked[12:end], (address_record(padding=padding),), additional
    )


def rcode(answer: bytes) -> int:
    return answer[3] & 0xF
