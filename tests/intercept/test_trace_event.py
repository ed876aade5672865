"""An event's bytes, as bpf/trace.h lays them out, and the words for its numbers."""

from __future__ import annotations

import socket
import struct

import pytest

from pyambient.intercept.trace_event import DECISIONS, HOOKS, Event
from pyambient.model.address import SocketAddress


def packed(
    source: str = "::",
    from_port: int = 0,
    to: str = "::ffff:10.0.0.3",
    *,
    decision: int = 1,
    hook: int = 1,
    process: bytes = b"",
    protocol: int = 6,
    family: int = 0,
) -> bytes:
    ends = (socket.inet_pton(socket.AF_INET6, ip) for ip in (source, to))
    numbers = (from_port, 8080, 1_000_000_001, process, 7, decision, hook, protocol, family)
    return struct.pack("=Q16s16sIIQ16sIIHHHxx", 4711, *ends, *numbers)


def test_a_call() -> None:
    """Of a process that is known, from a socket that has no address yet."""
    word = 1 | 15001 << 16
    assert Event.unpack(packed(decision=word, process=b"curl")) == Event(
        *(4711, 1_000_000_001, "captured", "", "outbound", "tcp"),
        *(None, SocketAddress("10.0.0.3", 8080), 15001, "connect", 7, "curl"),
    )


@pytest.mark.parametrize(
    ("source", "port", "found"),
    [
        ("::", 0, None),
        ("::ffff:0.0.0.0", 0, None),
        ("::ffff:0.0.0.0", 53, SocketAddress("0.0.0.0", 53)),
        ("::ffff:10.0.0.2", 0, SocketAddress("10.0.0.2", 0)),
        ("fd00::2", 40000, SocketAddress("fd00::2", 40000)),
    ],
)
def test_a_source(source: str, port: int, found: SocketAddress | None) -> None:
    """None where nothing is known of it."""
    assert Event.unpack(packed(source, port)).source == found


def test_an_ipv4_address_alone() -> None:
    """As a program puts it that does not look which family it is."""
    event = Event.unpack(packed("::10.0.0.2", 40000, "::10.0.0.3", family=socket.AF_INET))
    ends = SocketAddress("10.0.0.2", 40000), SocketAddress("10.0.0.3", 8080)
    assert (event.source, event.destination) == ends


@pytest.mark.parametrize(
    ("word", "decision", "direction", "reason"),
    [
        (2, "redirected", "outbound", ""),
        (0x83 | 15006 << 16, "steered", "inbound", ""),
        (0x84, "delivered", "inbound", ""),
        (5, "excluded", "outbound", ""),
        (0x86, "probe", "inbound", ""),
        (7 | 1 << 8, "refused", "outbound", "no listener"),
        (0x87 | 5 << 8, "refused", "inbound", "reserved port"),
        (8, "dropped", "outbound", "captured"),
        (9 | 6 << 8, "counted", "outbound", "dns"),
        (11 | 99 << 8, "11", "outbound", "99"),
    ],
)
def test_a_decision(word: int, decision: str, direction: str, reason: str) -> None:
    """The reasons of guards are those that they count by; an unknown number stays a number."""
    event = Event.unpack(packed(decision=word))
    assert (event.decision, event.direction, event.reason) == (decision, direction, reason)


@pytest.mark.parametrize(
    ("word", "protocol"),
    [(1, "tcp"), (2 | 0x40, "udp"), (8 | 6 << 8, "udp"), (8 | 4 << 8, "unknown")],
)
def test_a_packet_is_of_the_protocol_that_it_was_judged_for(word: int, protocol: str) -> None:
    """A program that judges packets tells it by its decision."""
    assert Event.unpack(packed(decision=word, protocol=0)).protocol == protocol


def test_every_number_has_its_word() -> None:
    """The words that a user may look for."""
    assert [Event.unpack(packed(decision=n)).decision for n in range(1, 10)] == [*DECISIONS[1:]]
    assert [Event.unpack(packed(hook=n)).hook for n in range(1, 9)] == [*HOOKS[1:]]
    assert [Event.unpack(packed(protocol=n)).protocol for n in (6, 17, 132)] == [
        "tcp",
        "udp",
        "132",
    ]


def test_a_name_that_is_no_text() -> None:
    """A process may call itself anything."""
    assert (
        Event.unpack(packed(process=b"\xff\xfe\0rest")).process == "\N{REPLACEMENT CHARACTER}" * 2
    )
