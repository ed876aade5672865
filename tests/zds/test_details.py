"""The details channel's messages: JSON there and back, and nothing else let through."""

from __future__ import annotations

import json

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.ports import Ports
from pyambient.zds.details import (
    PACKET_LIMIT,
    Answer,
    Describe,
    DetailsError,
    DnsCapture,
    Drain,
    Explain,
    PodDetails,
    Question,
    Settle,
    Status,
    decode_answer,
    decode_question,
    encode_answer,
    encode_question,
)

MOVED = Ports(outbound=15101, hbone=15108)
DETAILS = PodDetails("bpf", ("10.0.0.2", "fd00::2"), "east")


@pytest.mark.parametrize(
    ("question", "fields"),
    [
        (
            Describe("u1", DETAILS),
            {
                "describe": "u1",
                "details": {
                    "backend": "bpf",
                    "addresses": ["10.0.0.2", "fd00::2"],
                    "network": "east",
                    "dns": None,
                    "ports": [15001, 15006, 15008, 15053],
                },
            },
        ),
        (
            Describe("u1", PodDetails("bpf", (), dns=DnsCapture("/sys/fs/bpf/x", 7), ports=MOVED)),
            {
                "describe": "u1",
                "details": {
                    "backend": "bpf",
                    "addresses": [],
                    "network": "",
                    "dns": {"bpffs": "/sys/fs/bpf/x", "netns_cookie": 7},
                    "ports": [15101, 15006, 15108, 15053],
                },
            },
        ),
        (Drain("u1", 2.5), {"drain": "u1", "timeout": 2.5}),
        (Settle("u1", 2.5), {"settle": "u1", "timeout": 2.5}),
        (Status("u1"), {"status": "u1"}),
        (
            Explain("u1", SocketAddress("fd00::2", 80), "10.0.0.1"),
            {"explain": "u1", "to": ["fd00::2", 80], "source": "10.0.0.1"},
        ),
    ],
)
def test_questions_go_there_as_json(question: Question, fields: dict[str, object]) -> None:
    """A question is one JSON object with the id that its answer repeats."""
    packet = encode_question(7, question)
    assert json.loads(packet) == {"id": 7, **fields}
    assert decode_question(packet) == (7, question)


@pytest.mark.parametrize(
    "answer", [Answer(7, {"connections": 3}), Answer(7), Answer(7, error="no")]
)
def test_answers_come_back(answer: Answer) -> None:
    """A result, nothing, or an error."""
    assert decode_answer(encode_answer(answer)) == answer


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 60000,
        b'{"id": 1}',
        b'{"status": "u1"}',
        b'{"id": "1", "status": "u1"}',
        b'{"id": 1, "drain": "u1", "timeout": "soon"}',
        b'{"id": 1, "describe": "u1", "details": {"backend": "bpf", "addresses": "10.0.0.2"}}',
        b'{"id": 1, "describe": "u1", "details": {"backend": "a", "addresses": [], "dns": 1}}',
    ],
)
def test_what_asks_nothing_is_refused(packet: bytes) -> None:
    """A packet of any other form raises the channel's own error and no other."""
    with pytest.raises(DetailsError):
        decode_question(packet)


@pytest.mark.parametrize("packet", [b"", b"{}", b'{"id": 1}', b'{"id": null, "result": 1}'])
def test_what_answers_nothing_is_refused(packet: bytes) -> None:
    """An answer must say to what, and what."""
    with pytest.raises(DetailsError):
        decode_answer(packet)


def test_packets_are_bounded_both_ways() -> None:
    """Neither end makes or takes a packet above the limit."""
    many = PodDetails("bpf", ("10.0.0.2",) * PACKET_LIMIT)
    with pytest.raises(DetailsError, match="limit"):
        encode_question(1, Describe("u1", many))
    with pytest.raises(DetailsError, match="limit"):
        decode_answer(b" " * (PACKET_LIMIT + 1))
