"""What the forwarder reads in messages, and the few it writes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyambient.dns.message import (
    FORMERR,
    SERVFAIL,
    MalformedQueryError,
    failure,
    fitting,
    is_answer,
    parse_query,
)

from . import build

ASKED = parse_query(build.query())
WITH_EDNS = parse_query(build.query(edns=1232))


def test_a_query_keeps_every_byte_and_its_questions_case():
    message = build.query(edns=4096)
    query = parse_query(message)
    assert query.message == message
    assert query.question == b"\3www\7Example\3COM\0\0\1\0\1"
    assert query.id == b"\x12\x34"


def test_a_query_without_a_question_is_one_for_a_cookie():
    assert parse_query(build.message(7, build.RD, additional=(build.opt(1232),))).question == b""


@pytest.mark.parametrize("message", [b"", build.query()[:11], build.answer_to(build.query())])
def test_what_has_no_header_or_is_an_answer_gets_no_answer(message):
    with pytest.raises(MalformedQueryError) as error:
        parse_query(message)
    assert error.value.answer == b""


@pytest.mark.parametrize(
    "questions",
    [
        b"",
        b"\3www",
        b"\3www\0\0\1\0",
        b"\x40" + bytes(80),
        b"\xc0\x00\0\1\0\1",
        b"\3www\xc0\x0c\0\1\0\1",
        (b"\x3f" + bytes(63)) * 4 + b"\0\0\1\0\1",
    ],
    ids=["none", "cut name", "cut type", "bad label", "pointer", "pointer later", "256 bytes"],
)
def test_a_question_that_cannot_be_read_gets_formerr(questions):
    with pytest.raises(MalformedQueryError) as error:
        parse_query(struct.pack("!6H", 0x1234, build.RD, 1, 0, 0, 0) + questions)
    assert error.value.answer == b"\x12\x34\x81\x81" + bytes(8)


def test_two_questions_get_formerr():
    """RFC 9619: none of the answers could be told from the other."""
    message = struct.pack("!6H", 1, 0, 2, 0, 0, 0) + 2 * build.question()
    with pytest.raises(MalformedQueryError) as error:
        parse_query(message)
    assert build.rcode(error.value.answer) == FORMERR


@given(st.binary(max_size=300))
def test_no_bytes_make_more_than_a_query_or_a_malformed_one(noise):
    for message in (noise, build.query()[:12] + noise):
        try:
            query = parse_query(message)
        except MalformedQueryError:
            continue
        assert query.udp_size() >= 512
        assert len(failure(query, SERVFAIL, "why")) >= 12
        assert len(fitting(query, query.message + bytes(70000))) <= 70000
        is_answer(query, query.id, noise)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (build.query(), 512),
        (build.query(edns=100), 512),
        (build.query(edns=4096), 4096),
        (build.message(1, 0, build.question(), (build.address_record(),), (build.opt(900),)), 900),
        (build.message(1, 0, build.question(), additional=(b"\1x" + build.opt(900),)), 512),
        (build.message(1, 0, build.question(), additional=(build.opt(900)[:-1],)), 512),
    ],
    ids=["none", "too small", "EDNS", "behind a record", "not of the root", "cut"],
)
def test_the_size_that_a_client_takes(message, size):
    assert parse_query(message).udp_size() == size


def answer(**changed):
    values = {"ident": 7, "flags": build.QR, "questions": ASKED.question} | changed
    return build.message(**values)


@pytest.mark.parametrize(
    ("message", "matches"),
    [
        (answer(), True),
        (answer(ident=8), False),
        (answer(flags=0), False),
        (answer(flags=build.QR | 0x2800), False),
        (answer(questions=ASKED.question.lower()), False),
        (answer(questions=build.question("www.example.org")), False),
        (answer(questions=build.question(kind=28)), False),
        (answer(questions=b""), False),
        (answer(questions=b"", flags=build.QR | 1), True),
        (answer(questions=b"", flags=build.QR | 4), True),
        (answer(questions=b"", flags=build.QR | 2), False),
        (answer()[:11], False),
        (answer()[:-1], False),
    ],
    ids=[
        "good", "id", "no answer", "opcode", "case", "name", "type", "no question",
        "FORMERR without a question", "NOTIMP without one", "SERVFAIL without one", "short", "cut",
    ],
)  # fmt: skip
def test_an_answer_has_the_id_the_opcode_and_the_very_question(message, matches):
    assert is_answer(ASKED, b"\0\x07", message) is matches


def test_the_answer_to_an_update_may_leave_its_zone_out():
    """RFC 2136 section 3.8."""
    update = parse_query(build.message(1, 0x2800, build.question("example.com", 6)))
    assert is_answer(update, b"\0\x07", build.message(7, build.QR | 0x2800))


@pytest.mark.parametrize(("padding", "fits"), [(463, True), (464, False)])
def test_without_edns_512_bytes_fit(padding, fits):
    message = build.answer_to(ASKED.message, padding=padding)
    cut = fitting(ASKED, message)
    assert (cut == message) is fits
    assert len(cut) <= 512


def test_a_truncated_answer_is_header_question_and_opt():
    theirs = build.opt(4096, b"\0\x0a\0\x08" + bytes(8), 0x8000)
    message = build.answer_to(WITH_EDNS.message, padding=2000, more=theirs)
    flags = build.QR | build.RD | build.RA | build.TC
    assert fitting(WITH_EDNS, message) == build.message(
        0x1234, flags, WITH_EDNS.question, additional=(theirs,)
    )


@pytest.mark.parametrize(("most", "fits"), [(1232, False), (0xFFFF, True)])
def test_the_way_to_the_client_may_take_less(most, fits):
    asked = parse_query(build.query(edns=4096))
    message = build.answer_to(asked.message, padding=1200)
    assert (fitting(asked, message, most) == message) is fits


def test_an_opt_record_that_does_not_fit_itself_is_left_out():
    message = build.answer_to(ASKED.message, padding=2000, more=build.opt(4096, bytes(600)))
    flags = build.QR | build.RD | build.RA | build.TC
    assert fitting(ASKED, message) == build.message(0x1234, flags, ASKED.question)


def test_an_answer_of_our_own_says_why_where_the_client_speaks_edns():
    """RFC 8914: code 23, network error, and a text."""
    assert failure(ASKED, SERVFAIL, "why") == build.message(
        0x1234, build.QR | build.RD | build.RA | SERVFAIL, ASKED.question
    )
    asked = parse_query(
        build.message(1, 0x10, build.question(), additional=(build.opt(4096, flags=0x8000),))
    )
    reason = struct.pack("!HHH", 15, 5, 23) + b"why"
    assert failure(asked, SERVFAIL, "why") == build.message(
        1,
        build.QR | build.RA | 0x10 | SERVFAIL,
        asked.question,
        additional=(build.opt(1232, reason, 0x8000),),
    )


@pytest.mark.parametrize(
    ("kind", "transfer"), [(build.A, False), (build.AXFR, True), (build.IXFR, True)]
)
def test_transfers_are_known_by_the_type_of_the_question(kind, transfer):
    query = parse_query(build.message(1, 0, build.question("example.com", kind)))
    assert query.is_transfer is transfer
