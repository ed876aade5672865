"""Which resolver an app had asked, told from a DNS query that arrived at the proxy.

General theory of operation
---------------------------
The proxy's UDP socket on 15053 learns from IP_PKTINFO or IPV6_PKTINFO to which address of the pod
a query came. What that says depends on the backend:

* `bpf`: the hooks in bpf/dns.bpf.c send each resolver's queries to an address of its own, a
  *slot*: one of DNS_SLOTS_V4 or DNS_SLOTS_V6, all of which are local in the pod. The map
  `resolvers` of the node tells whose slot it is. The answer has to come from the slot's address,
  which needs IP_TRANSPARENT or IP_FREEBIND for IPv6; hooks turn it into the resolver's.
* `tc`: the query was turned round as it is, so it came to the resolver's own address. Only the
  port is another one, and is put back in the answer.
* `nftables` and `iptables`: the query was redirected, and conntrack knows from where. The answer
  has to come from the address that the query came to; netfilter turns it into the resolver's.

What was sent to the proxy's port itself has no resolver, and shall have no answer.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from pyambient.errors import PyambientError
from pyambient.model.address import SocketAddress, canonical_ip
from pyambient.model.numbers import (
    DNS_PORT,
    DNS_SLOT_COUNT,
    DNS_SLOTS_V4,
    DNS_SLOTS_V6,
    RESOLVER_PORT,
)
from pyambient.netns import Netns

from .ctnetlink import Conntrack, Flow
from .kernel_objects import Map

RESOLVERS_MAP: Final = "resolvers"
DEVICES_MAP: Final = "devices"
# struct slot, struct resolver and struct device of bpf/maps.h.
_SLOT: Final = struct.Struct("=QII")
_RESOLVER: Final = struct.Struct("=16sQII")
_DEVICE: Final = struct.Struct("=QII")
_LO: Final = 1  # the index of lo in every network namespace
_V4_SLOTS: Final = int.from_bytes(socket.inet_pton(socket.AF_INET, DNS_SLOTS_V4))
_V6_SLOTS: Final = int.from_bytes(socket.inet_pton(socket.AF_INET6, DNS_SLOTS_V6))
_FE80: Final = bytes((0xFE, 0x80))


class ResolverLookup(Protocol):
    """Finds out for the proxy whom a query was meant for; close it with the pod."""

    def resolver(self, peer: tuple[str, int], local_ip: str) -> str | None:
        """The address whose port 53 the app at `peer` had addressed; None if nobody knows.

        `local_ip` is where the query arrived. Both are canonical text, IPv4-mapped as IPv4. The
        answer is canonical text too, a link-local one with its scope.
        """

    def close(self) -> None: ...


def bpf_resolvers(bpffs: Path, netns_cookie: int) -> ResolverLookup:
    """For a pod of the backend `bpf`; PyambientError where its maps are not pinned."""
    slots = _pinned(bpffs, RESOLVERS_MAP)
    try:
        return _Slots(slots, _pinned(bpffs, DEVICES_MAP), netns_cookie)
    except PyambientError:
        slots.close()
        raise


def _pinned(bpffs: Path, name: str) -> Map:
    pin = bpffs / "node" / name
    found = Map.open_pinned(pin)
    if found is None:
        raise PyambientError(f"the BPF map {pin} is gone", "enrol the pod again")
    return found


def addressed_resolvers(netns: Netns, is_own: Callable[[str], bool]) -> ResolverLookup:
    """For a pod of the backend `tc`; `is_own` tells which addresses are the pod's."""
    return _Addressed(netns, is_own)


def conntrack_resolvers(netns: Netns, port: int = DNS_PORT) -> ResolverLookup:
    """For a pod of a netfilter backend; `port` is the proxy's for DNS."""
    return _Redirects(Conntrack(netns), port)


def slot_number(ip: str) -> int | None:
    """The slot that this address of the pod is, or None."""
    if ":" in ip:
        number = int.from_bytes(socket.inet_pton(socket.AF_INET6, ip.partition("%")[0])) - _V6_SLOTS
    else:
        number = int.from_bytes(socket.inet_pton(socket.AF_INET, ip)) - _V4_SLOTS
    return number if 0 <= number < DNS_SLOT_COUNT else None


def slot_key(netns_cookie: int, number: int) -> bytes:
    """The key of a slot in the map."""
    return _SLOT.pack(netns_cookie, number, 0)


class _Slots:
    def __init__(self, slots: Map, devices: Map, cookie: int) -> None:
        self._slots = slots
        self._devices = devices
        self._cookie = cookie

    def resolver(self, peer: tuple[str, int], local_ip: str) -> str | None:  # noqa: ARG002 - the slot says it all
        number = slot_number(local_ip)
        found = None if number is None else self._slots.get(slot_key(self._cookie, number))
        if found is None:
            return None
        packed, _, scope, _ = _RESOLVER.unpack(found)
        ip = canonical_ip(socket.inet_ntop(socket.AF_INET6, packed))
        if not packed.startswith(_FE80):
            return ip
        scope = scope or self._only_device()
        return f"{ip}%{scope}" if scope else None

    def _only_device(self) -> int:
        """The device of the pod with IPv6, if it has just one; else 0.

        Hooks do not learn the scope that an app gives with a link-local address.
        """
        devices = map(_DEVICE.unpack, list(self._devices.keys()))
        found = [
            index
            for cookie, index, family in devices
            if (cookie, family) == (self._cookie, socket.AF_INET6) and index != _LO
        ]
        return found[0] if len(found) == 1 else 0

    def close(self) -> None:
        self._slots.close()
        self._devices.close()

    def __repr__(self) -> str:
        return f"<resolvers of netns {self._cookie} in {self._slots!r}>"


class _Addressed:
    def __init__(self, netns: Netns, is_own: Callable[[str], bool]) -> None:
        self._netns = netns
        self._is_own = is_own

    def resolver(self, peer: tuple[str, int], local_ip: str) -> str | None:  # noqa: ARG002 - the address says it all
        ip = local_ip.partition("%")[0]
        if self._is_own(ip):
            return None
        if not ip.startswith("fe80:"):
            return ip
        scope = self._only_device()
        return f"{ip}%{scope}" if scope else None

    def _only_device(self) -> int:
        """The pod's device beside lo, if it has just one; else 0: all comes by lo."""
        with self._netns.entered():
            found = [index for index, _ in socket.if_nameindex() if index != _LO]
        return found[0] if len(found) == 1 else 0

    def close(self) -> None:
        """Nothing is open."""

    def __repr__(self) -> str:
        return f"<resolvers addressed in {self._netns.name}>"


class _Redirects:
    def __init__(self, conntrack: Conntrack, port: int) -> None:
        self._conntrack = conntrack
        self._port = port

    def resolver(self, peer: tuple[str, int], local_ip: str) -> str | None:
        answers = Flow(SocketAddress(local_ip, self._port), SocketAddress(*peer))
        opening = self._conntrack.opening(answers)
        if opening is None or opening.destination.port != RESOLVER_PORT:
            return None
        ip = opening.destination.ip
        return None if ip.startswith("fe80:") else ip  # conntrack keeps no scope

    def close(self) -> None:
        self._conntrack.close()

    def __repr__(self) -> str:
        return f"<resolvers in {self._conntrack!r}>"
