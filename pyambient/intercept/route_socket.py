"""Devices, addresses, routes and rules of a pod, in rtnetlink's own words (rtnetlink(7)).

An enrolment says some thirty such things. pyroute2 runs an event loop for each of them, which
takes a millisecond and more; here one is a send(2), a recv(2) and a few numbers.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from typing import Final, NamedTuple

from pyambient.netns import Netns

from .netlink_socket import Attributes, NetlinkSocket, attributes_of, packed

_REPLACE, _EXCL, _CREATE = 0x100, 0x200, 0x400
_GETLINK, _GETADDR, _GETNSID = 18, 22, 90
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NEWRULE, _DELRULE, _GETRULE = 32, 33, 34
_VERBS: Final = {"add": _CREATE | _EXCL, "replace": _CREATE | _REPLACE, "del": 0}
_STATIC: Final = 4  # RTPROT_STATIC
_IFLA_IFNAME, _IFLA_LINK, _IFLA_LINKINFO, _IFLA_LINK_NETNSID = 3, 5, 18, 37
_IFLA_INFO_KIND: Final = 1
_NETNSA_NSID, _NETNSA_FD = 1, 3
_NO_NSID: Final = -1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_RTA_DST, _RTA_OIF, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE = 1, 4, 6, 7, 15
_FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE, _FRA_FWMASK = 6, 10, 15, 16
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_NO_DEVICE: Final = frozenset((errno.ENODEV, errno.EINVAL))  # a name that none can have
_LINK: Final = struct.Struct("=BxHiII")  # ifinfomsg
_ADDRESS: Final = struct.Struct("=BBBBI")  # ifaddrmsg
_ROUTE: Final = struct.Struct("=8BI")  # rtmsg, and fib_rule_hdr


class Link(NamedTuple):
    """A device by its interface index; `flags` are IFF_*."""

    device: int
    flags: int
    name: str


class Pairing(NamedTuple):
    """A device by its index, of what kind it is, and which other device it belongs to.

    `peer` is an index in the network namespace that is `peer_netns` to this one, _NO_NSID where it
    is this very one.
    """

    device: int
    kind: str
    peer: int
    peer_netns: int


class Address(NamedTuple):
    """The local end's address on a device, given by its index; `flags` are IFA_F_*."""

    device: int
    flags: int
    ip: str


class Route(NamedTuple):
    """A route; `destination` is "default" or a CIDR, 0 a device or metric that it does not name."""

    table: int
    kind: int
    destination: str
    device: int
    source: str | None
    metric: int


class Rule(NamedTuple):
    """A routing rule that selects by a mark, or by something else; 0 is what it does not name."""

    priority: int
    mark: int
    mask: int
    action: int
    table: int


class RouteSocket(NetlinkSocket):
    """One that speaks rtnetlink."""

    def __init__(self, netns: Netns) -> None:
        super().__init__(netns, socket.NETLINK_ROUTE)

    def links(self) -> list[Link]:
        body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        return [_link(answer) for answer in self.dump(_GETLINK, body)]

    def pairing(self, *, name: str = "", index: int = 0) -> Pairing | None:
        """Of the device with this name, or this index; None if there is none."""
        body = _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0)
        asked = {_IFLA_IFNAME: os.fsencode(name) + b"\0" if name else None}
        try:
            answer = self.get(_GETLINK, body + packed(asked))
        except OSError as error:
            if error.errno in _NO_DEVICE:
                return None
            raise
        return None if answer is None else _pairing(answer)

    def number_of(self, other: Netns) -> int:
        """What this network namespace calls another one; _NO_NSID if it has no name for it."""
        answer = self.get(_GETNSID, bytes(4) + packed({_NETNSA_FD: _number(other.fd)})) or b""
        return _read_signed(attributes_of(answer[4:]), _NETNSA_NSID)

    def addresses(self) -> list[Address]:
        body = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        found = map(_address, self.dump(_GETADDR, body))
        return [address for address in found if address is not None]

    def routes(self, family: int, table: int) -> list[Route]:
        body = _ROUTE.pack(family, *[0] * 7, 0)
        found = map(_route, self.dump(_GETROUTE, body))
        return [route for route in found if route.table == table]

    def rules(self, family: int) -> list[Rule]:
        return [_rule(answer) for answer in self.dump(_GETRULE, _ROUTE.pack(family, *[0] * 8))]

    def change_route(self, verb: str, family: int, route: Route, scope: int) -> None:
        """`verb` is add, replace or del."""
        destination, _, length = route.destination.partition("/")
        head = (family, int(length or 0), 0, 0, 0, _STATIC, scope, route.kind, 0)
        attributes = {
            _RTA_DST: socket.inet_pton(family, destination) if length else None,
            _RTA_OIF: _number(route.device),
            _RTA_PRIORITY: _number(route.metric),
            _RTA_PREFSRC: socket.inet_pton(family, route.source) if route.source else None,
            _RTA_TABLE: _number(route.table),
        }
        kind = _DELROUTE if verb == "del" else _NEWROUTE
        self.change(kind, _VERBS[verb], _ROUTE.pack(*head) + packed(attributes))

    def change_rule(self, verb: str, family: int, rule: Rule) -> None:
        """`verb` is add or del."""
        head = (family, *[0] * 6, rule.action, 0)
        attributes = {
            _FRA_PRIORITY: _number(rule.priority),
            _FRA_FWMARK: _number(rule.mark),
            _FRA_FWMASK: _number(rule.mask),
            _FRA_TABLE: _number(rule.table) if rule.table else None,
        }
        kind = _DELRULE if verb == "del" else _NEWRULE
        self.change(kind, _VERBS[verb], _ROUTE.pack(*head) + packed(attributes))


def _link(body: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(body)
    name = attributes_of(body[_LINK.size :]).get(_IFLA_IFNAME, b"")
    return Link(index, flags, os.fsdecode(name.rstrip(b"\0")))


def _pairing(body: bytes) -> Pairing:
    _, _, index, _, _ = _LINK.unpack_from(body)
    found = attributes_of(body[_LINK.size :])
    kind = attributes_of(found.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND, b"")
    where = _read_signed(found, _IFLA_LINK_NETNSID)
    return Pairing(index, os.fsdecode(kind.rstrip(b"\0")), _read(found, _IFLA_LINK), where)


def _address(body: bytes) -> Address | None:
    """None for a family that is not IP. IFA_ADDRESS is the peer where there is IFA_LOCAL."""
    family, _, flags, _, index = _ADDRESS.unpack_from(body)
    found = attributes_of(body[_ADDRESS.size :])
    raw = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    if raw is None or family not in _FAMILIES:
        return None
    return Address(index, _read(found, _IFA_FLAGS) or flags, socket.inet_ntop(family, raw))


def _route(body: bytes) -> Route:
    family, length, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(body)
    found = attributes_of(body[_ROUTE.size :])
    raw, source = found.get(_RTA_DST), found.get(_RTA_PREFSRC)
    destination = f"{socket.inet_ntop(family, raw)}/{length}" if raw and length else "default"
    return Route(
        _read(found, _RTA_TABLE) or table,
        kind,
        destination,
        _read(found, _RTA_OIF),
        socket.inet_ntop(family, source) if source else None,
        _read(found, _RTA_PRIORITY),
    )


def _rule(body: bytes) -> Rule:
    *_, table, _, _, action, _ = _ROUTE.unpack_from(body)
    found = attributes_of(body[_ROUTE.size :])
    kinds = (_FRA_PRIORITY, _FRA_FWMARK, _FRA_FWMASK)
    priority, mark, mask = (_read(found, kind) for kind in kinds)
    return Rule(priority, mark, mask, action, _read(found, _FRA_TABLE) or table)


def _number(value: int) -> bytes:
    return struct.pack("=I", value)


def _read(attributes: Attributes, kind: int) -> int:
    raw = attributes.get(kind)
    return int.from_bytes(raw, sys.byteorder) if raw else 0


def _read_signed(attributes: Attributes, kind: int) -> int:
    raw = attributes.get(kind)
    return int.from_bytes(raw, sys.byteorder, signed=True) if raw else _NO_NSID
