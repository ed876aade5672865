"""Which connections of one direction are captured, chosen by port and by the other end's address.

A connection is captured if its port and its address are included, and neither is excluded. Where
nothing is included by name, everything is. The port is the one that is connected to; the address
is the destination of what goes out and the client of what comes in. A CIDR that covers another one
of its list says it all, and the other is dropped.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self, TypeAlias

from pyambient.errors import UsageError

Cidr: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

MOST_CIDRS: Final = 10_000
MOST_PORTS: Final = 1_000
_LAST_PORT: Final = 65_535
_MAPPED_BITS: Final = 96


class PortRange(NamedTuple):
    """Ports from `first` to `last`, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class Ruling(NamedTuple):
    """Whether a connection is captured, and why."""

    captured: bool
    why: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The choices for one direction: ports in order and disjoint, CIDRs in order, IPv4 first."""

    include_ports: tuple[PortRange, ...] = ()
    include_cidrs: tuple[Cidr, ...] = ()
    exclude_ports: tuple[PortRange, ...] = ()
    exclude_cidrs: tuple[Cidr, ...] = ()

    def captures(self, ip: str, port: int) -> bool:
        """The decision that every backend has to take for a connection."""
        return self.ruling(ip, port).captured

    def ruling(self, ip: str, port: int) -> Ruling:
        """That decision, and the choice that it comes from."""
        if found := _range_of(port, self.exclude_ports):
            return Ruling(False, f"port {port} is excluded by {found}")
        if self.include_ports and not _range_of(port, self.include_ports):
            return Ruling(False, f"port {port} is not included ({_some(self.include_ports)})")
        if cidr := _cidr_of(ip, self.exclude_cidrs):
            return Ruling(False, f"{ip} is excluded by {cidr}")
        if self.include_cidrs and not (cidr := _cidr_of(ip, self.include_cidrs)):
            return Ruling(False, f"{ip} is not included ({_some(self.include_cidrs)})")
        included = f"{ip} is included by {cidr}" if cidr else "it is included"
        return Ruling(True, f"nothing excludes port {port} and {ip}, {included}")

    def excluded_ports(self) -> tuple[PortRange, ...]:
        """The ports that are not captured, whatever the address."""
        others = _complement(self.include_ports) if self.include_ports else ()
        return _merged((*others, *self.exclude_ports))

    def to_json(self) -> dict[str, str]:
        """What was chosen, by its name; a list is text as in Istio's annotations."""
        return {name: text for name, text in zip(CHOICES, self.texts(), strict=True) if text}

    def texts(self) -> tuple[str, ...]:
        """All lists, in the order of CHOICES, as text; empty where there is none."""
        return tuple(",".join(map(str, getattr(self, name))) for name in CHOICES)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The selection of such texts; UsageError for what is no port or CIDR, or too many."""
        chosen: dict[str, Any] = {}
        for name, text in fields.items():
            if name not in _PARSERS:
                raise UsageError(f"{name!r} is no choice of ports or CIDRs", "upgrade pyambient")
            if not isinstance(text, str):
                raise UsageError(f"{name} cannot be {text!r}")
            items = [item.strip() for item in text.split(",")] if text.strip() else []
            everything = items == ["*"] and name.startswith("include")
            chosen[name] = () if everything else _PARSERS[name](items)
        made = cls(**chosen)
        _refuse_too_many("CIDRs", MOST_CIDRS, made.include_cidrs, made.exclude_cidrs)
        _refuse_too_many("ports", MOST_PORTS, made.include_ports, made.exclude_ports)
        return made

    def __str__(self) -> str:
        """For people: what is excluded, what alone is included; short, however much it is."""
        chosen = {name: getattr(self, name) for name in CHOICES}
        return "; ".join(f"{n.replace('_', ' ')} {_some(c)}" for n, c in chosen.items() if c)


CHOICES: Final = tuple(field.name for field in dataclasses.fields(Selection))
EVERYTHING: Final = Selection()
ANYWHERE: Final = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))


def covers(cidr: Cidr, other: Cidr) -> bool:
    """Whether all addresses of `other` are in `cidr`."""
    if cidr.version != other.version or cidr.prefixlen > other.prefixlen:
        return False
    hidden = cidr.max_prefixlen - cidr.prefixlen
    return int(cidr.network_address) >> hidden == int(other.network_address) >> hidden


def _range_of(port: int, ranges: tuple[PortRange, ...]) -> PortRange | None:
    return next((found for found in ranges if found.first <= port <= found.last), None)


def _cidr_of(ip: str, cidrs: tuple[Cidr, ...]) -> Cidr | None:
    address = ipaddress.ip_address(ip)
    return next((cidr for cidr in cidrs if address in cidr), None)


def in_order(cidrs: Iterable[Cidr]) -> list[Cidr]:
    """IPv4 before IPv6, by address, a CIDR before those that it covers."""
    return sorted(cidrs, key=lambda c: (c.version, int(c.network_address), c.prefixlen))


def _ports(items: Iterable[str]) -> tuple[PortRange, ...]:
    return _merged(map(_port_range, items))


def _port_range(text: str) -> PortRange:
    first, dash, last = text.partition("-")
    numbers = (first, last) if dash else (first, first)
    if all(n.isascii() and n.isdigit() and len(n) <= 5 for n in numbers):
        made = PortRange(*map(int, numbers))
        if 0 < made.first <= made.last <= _LAST_PORT:
            return made
    raise UsageError(f"{text!r} is no port", "give numbers and ranges, as 22,8000-8100")


def _cidrs(items: Iterable[str]) -> tuple[Cidr, ...]:
    kept: list[Cidr] = []
    for cidr in in_order(map(_cidr, items)):
        if not (kept and covers(kept[-1], cidr)):
            kept.append(cidr)
    return tuple(kept)


def _cidr(text: str) -> Cidr:
    try:
        found = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise UsageError(
            f"{text!r} is no CIDR", "give addresses and networks, as 10.0.0.0/8,fd00::/8"
        ) from None
    if str(found) != text and found.network_address != ipaddress.ip_interface(text).ip:
        raise UsageError(f"{text!r} is an address within a network", f"write {found}")
    mapped = found.version == 6 and found.network_address.ipv4_mapped
    if mapped and found.prefixlen >= _MAPPED_BITS:
        raise UsageError(f"{text!r} is IPv4", f"write {mapped}/{found.prefixlen - _MAPPED_BITS}")
    return found


def _merged(ranges: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """In order, disjoint, and neighbours joined."""
    merged: list[PortRange] = []
    for found in sorted(ranges):
        if merged and found.first <= merged[-1].last + 1:
            merged[-1] = PortRange(merged[-1].first, max(merged[-1].last, found.last))
        else:
            merged.append(found)
    return tuple(merged)


def _complement(ranges: tuple[PortRange, ...]) -> tuple[PortRange, ...]:
    ends = [-1, *itertools.chain.from_iterable(ranges), _LAST_PORT + 1]
    gaps = zip(ends[::2], ends[1::2], strict=True)
    return tuple(PortRange(a + 1, b - 1) for a, b in gaps if a + 1 <= b - 1)


def _refuse_too_many(what: str, most: int, *lists: tuple[Any, ...]) -> None:
    count = sum(map(len, lists))
    if count > most:
        raise UsageError(f"{count} {what} are too many", f"give at most {most} for a direction")


def _some(chosen: tuple[Any, ...], most: int = 8) -> str:
    more = f" and {len(chosen) - most} more" if len(chosen) > most else ""
    return ",".join(map(str, chosen[:most])) + more


_PARSERS: Final = {
    "include_ports": _ports,
    "include_cidrs": _cidrs,
    "exclude_ports": _ports,
    "exclude_cidrs": _cidrs,
}
