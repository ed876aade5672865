"""What the netfilter backends have in common: their rules, in the words of neither tool.

General theory of operation
---------------------------
TCP is redirected, and DNS. Outbound, every new connection of an app goes to 15001, or to 15053 if
it is for a resolver; inbound, those from outside go to 15006, and those to 15008 are left alone.
Where somebody in the pod has one of these ports, what stands for it is named instead; for 15008,
which stays what others connect to, there is a redirect more.
The proxy's own sockets are known by their mark (any container with CAP_NET_RAW can set it: only
backend "bpf" does without that trust). A connection from the proxy to the app keeps the client's
address, so the app's answers would leave the pod: the proxy's mark is noted on the conntrack entry,
the answers get our loopback mark, and a rule of `fib` delivers them on lo.

DNS over UDP is redirected to 15053; conntrack turns the answers back, and tells the proxy whom the
app had asked. Where one socket asks two resolvers, netfilter gives the second flow another source
port, so both get their answers. The proxy's own queries are not tracked, nor are the answers to
them: they could be taken for an app's.

Two things differ from Istio. Redirects match the opening segment alone: a connection from before
the enrolment, which conntrack takes for new at its next packet, goes on untouched. And the rules
come in three transactions, one per stage, so that the redirects can be withdrawn while the rest
keeps live connections working. Connections that were redirected survive that, too: netfilter
consults nat rules for a connection's first packet only. What must stay are the base chains:
without any in the namespace, the kernel stops translating.

What the pod's selection excludes is not redirected, and that is all it takes: a connection keeps
what was decided on its first packet. The traffic of virtual interfaces is redirected where it
comes in, TCP alone, as Istio does it.

A socket bound to a device is not captured, and hangs (a query is refused with EPERM): after the
redirect it would have to reach 127.0.0.1 by that device. One that is bound once it is connected
would send there what was meant for the proxy, in plain text; what is for localhost is dropped where
it would leave by a device.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from pyambient.model.numbers import (
    HBONE_PORT,
    LOOPBACK_MARK,
    PROBE_ADDRESS_V4,
    PROBE_ADDRESS_V6,
    PROXY_MARK,
    RESOLVER_PORT,
)
from pyambient.model.ports import WELL_KNOWN, Ports

from .options import CaptureOptions
from .selection import Cidr, PortRange, Selection


class Field(enum.Enum):
    """What a rule looks at; marks are compared under MARK_MASK."""

    INPUT_DEVICE = enum.auto()
    SOURCE = enum.auto()
    DESTINATION = enum.auto()
    OUTPUT_DEVICE = enum.auto()
    PROTOCOL = enum.auto()
    TCP_OPENING = enum.auto()
    DESTINATION_PORT = enum.auto()
    UDP_SOURCE_PORT = enum.auto()
    UDP_DESTINATION_PORT = enum.auto()
    MARK = enum.auto()
    CONNECTION_MARK = enum.auto()


class Action(enum.Enum):
    """What a rule does; REDIRECT goes to the rule's port.

    RETURN leaves the connection to the rules of others, as if ours were not there.
    """

    ACCEPT = enum.auto()
    DROP = enum.auto()
    RETURN = enum.auto()
    REDIRECT = enum.auto()
    NOT_TRACKED = enum.auto()
    NOTE_ON_CONNECTION = enum.auto()
    MARK_AS_CONNECTION = enum.auto()


class Place(enum.Enum):
    """Where rules are: the redirects see connections that begin, the others every packet."""

    REPLIES_IN = "replies_in"
    REPLIES_OUT = "replies_out"
    LEAVING = "leaving"
    UNTRACKED_IN = "untracked_in"
    UNTRACKED_OUT = "untracked_out"
    INBOUND = "inbound"
    OUTBOUND = "outbound"


# What live connections need, and what therefore stays until they are gone.
FOUNDATION: Final = (Place.REPLIES_IN, Place.REPLIES_OUT, Place.LEAVING)
UNTRACKED: Final = (Place.UNTRACKED_IN, Place.UNTRACKED_OUT)


@dataclass(frozen=True, slots=True)
class Match:
    """One condition: the field has this value (of TCP_OPENING it is no matter), or has not.

    A tuple is several values: CIDRs or ranges of ports, of which the field has one.
    """

    field: Field
    value: str | int | tuple[str, ...] | tuple[PortRange, ...] = ""
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule; `why` is unique in its place."""

    why: str
    matches: tuple[Match, ...]
    action: Action
    port: int = 0


_TCP: Final = Match(Field.PROTOCOL, "tcp")
_UDP: Final = Match(Field.PROTOCOL, "udp")
_TO_RESOLVER: Final = Match(Field.UDP_DESTINATION_PORT, RESOLVER_PORT)
_OF_RESOLVER: Final = Match(Field.UDP_SOURCE_PORT, RESOLVER_PORT)
_TO_RESOLVER_BY_TCP: Final = Match(Field.DESTINATION_PORT, RESOLVER_PORT)
_OPENING: Final = Match(Field.TCP_OPENING)
_OF_PROXY: Final = Match(Field.MARK, PROXY_MARK)
_NOT_OF_PROXY: Final = Match(Field.MARK, PROXY_MARK, negated=True)
_TO_PROXY: Final = Match(Field.MARK, LOOPBACK_MARK)
_NOTED: Final = Match(Field.CONNECTION_MARK, LOOPBACK_MARK)
_BY_LO: Final = Match(Field.OUTPUT_DEVICE, "lo")
_BY_A_DEVICE: Final = Match(Field.OUTPUT_DEVICE, "lo", negated=True)


_UNTRACKED: Final = {
    Place.UNTRACKED_IN: Rule(
        "an answer to a query of the proxy",
        (_UDP, _OF_RESOLVER, _NOT_OF_PROXY),
        Action.NOT_TRACKED,
    ),
    Place.UNTRACKED_OUT: Rule(
        "a query of the proxy", (_UDP, _TO_RESOLVER, _OF_PROXY), Action.NOT_TRACKED
    ),
}


def rules(
    place: Place, options: CaptureOptions, *, ipv6: bool, ports: Ports = WELL_KNOWN
) -> tuple[Rule, ...]:
    """All rules of one place for one family, in their order."""
    match place:
        case Place.REPLIES_IN:
            why = "the proxy speaks with an app"
            return (Rule(why, (_OF_PROXY,), Action.NOTE_ON_CONNECTION),)
        case Place.REPLIES_OUT:
            return (Rule("an app answers the proxy", (_NOTED,), Action.MARK_AS_CONNECTION),)
        case Place.LEAVING:
            redirected = (_to_localhost(ipv6=ipv6), _BY_A_DEVICE)
            return (
                Rule("a captured connection by a device", (*redirected, _TCP), Action.DROP),
                Rule("a captured query by a device", (*redirected, _UDP), Action.DROP),
            )
        case Place.UNTRACKED_IN | Place.UNTRACKED_OUT:
            return (_UNTRACKED[place],) if options.dns else ()
        case Place.INBOUND:
            captured = () if options.bypass_inbound else _inbound(options.inbound, ports, ipv6=ipv6)
            hbone = _hbone(ports, ipv6=ipv6)
            return (*_from_virtual_interfaces(options.devices, ports), *hbone, *captured)
        case Place.OUTBOUND:
            return _outbound(options.outbound, ports, dns=options.dns, ipv6=ipv6)


def _hbone(ports: Ports, *, ipv6: bool) -> tuple[Rule, ...]:
    """None where it arrives where it is to go."""
    if ports.hbone == HBONE_PORT:
        return ()
    to_hbone = Match(Field.DESTINATION_PORT, HBONE_PORT)
    new = (_not_to_localhost(ipv6=ipv6), _TCP, _OPENING, to_hbone, _NOT_OF_PROXY)
    return (Rule("HBONE to the proxy", new, Action.REDIRECT, ports.hbone),)


def _inbound(selection: Selection, ports: Ports, *, ipv6: bool) -> tuple[Rule, ...]:
    not_hbone = Match(Field.DESTINATION_PORT, HBONE_PORT, negated=True)
    new = (_not_to_localhost(ipv6=ipv6), _TCP, _OPENING, not_hbone, _NOT_OF_PROXY)
    probe = Match(Field.SOURCE, _probe_address(ipv6=ipv6))
    return (
        Rule("a health probe of the node", (probe, _TCP), Action.ACCEPT),
        *_excluded(selection, Field.SOURCE, ipv6=ipv6),
        *(
            Rule("inbound to the proxy", (*included, *new), Action.REDIRECT, ports.inbound)
            for included in _included(selection, Field.SOURCE, ipv6=ipv6)
        ),
    )


def _outbound(selection: Selection, ports: Ports, *, dns: bool, ipv6: bool) -> tuple[Rule, ...]:
    beyond = _not_to_localhost(ipv6=ipv6)
    probe = Match(Field.DESTINATION, _probe_address(ipv6=ipv6))
    dns = dns and not any(
        first <= RESOLVER_PORT <= last for first, last in selection.excluded_ports()
    )
    # A rule of iptables has one destination.
    localhost: list[Rule] = []
    captured = _included(selection, Field.DESTINATION, ipv6=ipv6)
    if selection.include_cidrs:
        localhost.append(Rule("localhost", (_to_localhost(ipv6=ipv6),), Action.RETURN))
    else:
        captured = ((beyond,),)
    return (
        Rule("an answer to a health probe", (probe, _TCP), Action.ACCEPT),
        Rule("an answer to the proxy", (_TCP, _TO_PROXY), Action.ACCEPT),
        Rule("the pod to itself", (beyond, _BY_LO), Action.ACCEPT),
        *localhost,
        *_excluded(selection, Field.DESTINATION, ipv6=ipv6),
        *(rule for where in captured for rule in _to_proxy(where, ports, dns=dns)),
    )


def _to_proxy(where: tuple[Match, ...], ports: Ports, *, dns: bool) -> Iterator[Rule]:
    new = (*where, _TCP, _OPENING)
    if dns:
        queries = (*where, _UDP, _TO_RESOLVER, _NOT_OF_PROXY)
        yield Rule("DNS to the proxy", queries, Action.REDIRECT, ports.dns)
        to_resolver = (*new, _TO_RESOLVER_BY_TCP, _NOT_OF_PROXY)
        yield Rule("DNS over TCP to the proxy", to_resolver, Action.REDIRECT, ports.dns)
    yield Rule("outbound to the proxy", (*new, _NOT_OF_PROXY), Action.REDIRECT, ports.outbound)


def _from_virtual_interfaces(devices: tuple[str, ...], ports: Ports) -> Iterator[Rule]:
    """What comes in there is outbound traffic of others, a virtual machine's for example."""
    for device in devices:
        by_it = (Match(Field.INPUT_DEVICE, device), _TCP)
        why = f"outbound by {device}"
        yield Rule(f"{why} to the proxy", (*by_it, _OPENING), Action.REDIRECT, ports.outbound)
        yield Rule(f"the rest of what is {why}", by_it, Action.RETURN)


def _excluded(selection: Selection, address: Field, *, ipv6: bool) -> Iterator[Rule]:
    if ports := selection.excluded_ports():
        by_port = (_TCP, Match(Field.DESTINATION_PORT, ports))
        yield Rule("an excluded port", by_port, Action.RETURN)
    if cidrs := _of_family(selection.exclude_cidrs, ipv6=ipv6):
        yield Rule("an excluded CIDR", (Match(address, cidrs),), Action.RETURN)


def _included(selection: Selection, address: Field, *, ipv6: bool) -> tuple[tuple[Match, ...], ...]:
    """The condition of what is captured: no rule has it where this family is left out."""
    if not selection.include_cidrs:
        return ((),)
    cidrs = _of_family(selection.include_cidrs, ipv6=ipv6)
    return ((Match(address, cidrs),),) if cidrs else ()


def _of_family(cidrs: Iterable[Cidr], *, ipv6: bool) -> tuple[str, ...]:
    return tuple(str(cidr) for cidr in cidrs if (cidr.version == 6) is ipv6)


def _to_localhost(*, ipv6: bool) -> Match:
    return Match(Field.DESTINATION, "::1" if ipv6 else "127.0.0.1")


def _not_to_localhost(*, ipv6: bool) -> Match:
    return replace(_to_localhost(ipv6=ipv6), negated=True)


def _probe_address(*, ipv6: bool) -> str:
    """Where the node's health probes come from."""
    return PROBE_ADDRESS_V6 if ipv6 else PROBE_ADDRESS_V4
