"""What the BPF programs tell of their decisions: `struct event` of bpf/trace.h as a value."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from pyambient.model.address import SocketAddress, canonical_ip

from .guard_maps import REASONS

_EVENT: Final = struct.Struct("=Q16s16sIIQ16sIIHHH2x")
_OF_UDP: Final = 0x40
_INWARDS: Final = 0x80
_UNKNOWN: Final = frozenset(("::", "0.0.0.0"))  # noqa: S104 - no address yet
_PROTOCOLS: Final = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}
# Each in the order of its numbers in bpf/trace.h; 0 is none.
DECISIONS: Final = (
    *("", "captured", "redirected", "steered", "delivered"),
    *("excluded", "probe", "refused", "dropped", "counted"),
)
HOOKS: Final = (
    *("", "connect", "sendmsg", "bind", "sk_lookup"),
    *("redirect", "arrival", "guard", "guard_node"),
)
_REFUSALS: Final = (
    "",
    "no listener",
    "no route",
    "no room",
    "forged",
    "reserved port",
    "unreadable",
)
# Where a packet was judged: what it is about, unless it is TCP.
_OF_REASONS: Final = {"dns": "udp", "unreadable": "unknown", "unsigned": "unknown"}
_OF_A_GUARD: Final = frozenset(("dropped", "counted"))


@dataclass(frozen=True, slots=True)
class Event:
    """One decision; `netns` is the cookie of the pod's namespace, `at` CLOCK_MONOTONIC in ns.

    `direction` is seen from the pod. `source` is None where no address is chosen yet, `listener`
    0 where none is concerned, `pid` 0 where no process is known; `process` is its name, as it
    chose it.
    """

    netns: int
    at: int
    decision: str
    reason: str
    direction: str
    protocol: str
    source: SocketAddress | None
    destination: SocketAddress
    listener: int
    hook: str
    pid: int
    process: str

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        netns, source, to, from_port, to_port, at, process, pid, decided, hook, protocol, family = (
            _EVENT.unpack(raw)
        )
        decision = _word(DECISIONS, decided & ~(_INWARDS | _OF_UDP) & 0xFF)
        why = REASONS if decision in _OF_A_GUARD else _REFUSALS
        reason = _word(why, decided >> 8 & 0xFF)
        judged = "udp" if decided & _OF_UDP else _OF_REASONS.get(reason, "tcp")
        return cls(
            netns=netns,
            at=at,
            decision=decision,
            reason=reason,
            direction="inbound" if decided & _INWARDS else "outbound",
            protocol=_PROTOCOLS.get(protocol, str(protocol)) if protocol else judged,
            source=_source(source, from_port, family),
            destination=SocketAddress(_ip(to, family), to_port),
            listener=decided >> 16,
            hook=_word(HOOKS, hook),
            pid=pid,
            process=process.partition(b"\0")[0].decode(errors="replace"),
        )


def _word(words: Sequence[str], number: int) -> str:
    """A number of another version of the programs is shown as it is."""
    return words[number] if number < len(words) else str(number)


def _source(raw: bytes, port: int, family: int) -> SocketAddress | None:
    ip = _ip(raw, family)
    return None if ip in _UNKNOWN and not port else SocketAddress(ip, port)


def _ip(raw: bytes, family: int) -> str:
    """IPv4 is mapped, or alone in the last word if the family says so."""
    if family == socket.AF_INET:
        return socket.inet_ntop(family, raw[12:])
    return canonical_ip(socket.inet_ntop(socket.AF_INET6, raw))
