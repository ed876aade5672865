"""Routes and rules: how a packet that carries our mark is delivered inside its pod.

General theory of operation
---------------------------
A socket or packet marked LOOPBACK_MARK must reach a listener of this very pod, whatever its
destination. A policy rule sends the mark to a table of its own, and in that table everything is
local: `local default dev lo`. Four traps shape the requests:

* a local route needs scope host (254) for IPv4 and scope 0 for IPv6, else EINVAL;
* where the packet has no source yet (a connect, not a reply) the route must name one, or the
  destination becomes its own source and connect fails with ENETUNREACH;
* IPv6 reads metric 0 as 1024, so every metric is explicit, and the one by lo is the smallest;
* a socket bound to a device ignores the route by lo, so each device gets one too.

As last resort a second rule makes the mark unreachable where the table has no route for it. It
does not hold for IPv4 sockets bound to a device: where their look-up fails, the kernel takes any
destination for on-link. The connect hook of backend "bpf" refuses those itself.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import ClassVar, Self

from pyambient.model.numbers import (
    DEVICE_METRIC,
    DNS_SLOT_COUNT,
    DNS_SLOTS_V4,
    DNS_SLOTS_V6,
    LOOPBACK_MARK,
    LOOPBACK_METRIC,
    MARK_MASK,
    ROUTE_TABLE,
    RULE_PRIORITY,
)
from pyambient.netns import Netns

from . import route_socket
from .interface import Pod, PodNetwork, Stage, Step, step
from .rtnetlink import change, device_names, routes, session

_LOCAL = 2  # RTN_LOCAL
_LOCAL_TABLE = 255  # RT_TABLE_LOCAL
_SLOT_BITS = DNS_SLOT_COUNT.bit_length() - 1
_HOST_SCOPE = 254  # RT_SCOPE_HOST
_TO_TABLE = 1  # FR_ACT_TO_TBL
_UNREACHABLE = 7  # FR_ACT_UNREACHABLE
_GONE = frozenset({errno.ESRCH, errno.ENOENT, errno.ENODEV, errno.EAFNOSUPPORT})


def _family(*, ipv6: bool) -> int:
    return socket.AF_INET6 if ipv6 else socket.AF_INET


def _ip(*, ipv6: bool) -> str:
    return "ip -6" if ipv6 else "ip"


@step
@dataclass(frozen=True, slots=True)
class Route:
    """A default route of our table that delivers locally; `source` None leaves it to the packet."""

    kind: ClassVar[str] = "route"
    stage: ClassVar[Stage] = Stage.APPLY
    table: ClassVar[int] = ROUTE_TABLE
    destinations: ClassVar[tuple[str, str]] = ("default", "default")  # IPv4, IPv6

    ipv6: bool
    device: str
    source: str | None
    metric: int

    @property
    def destination(self) -> str:
        return self.destinations[self.ipv6]

    def describe(self) -> str:
        source = f" src {self.source}" if self.source else ""
        return (
            f"{_ip(ipv6=self.ipv6)} route add local {self.destination} dev {self.device}{source}"
            f" metric {self.metric} table {self.table}"
        )

    def apply(self, pod: Pod) -> Self:
        index = self._device_index(pod)
        if index is None:
            raise OSError(errno.ENODEV, f"there is no device {self.device}")
        # The kernel says EEXIST for any route of this metric, whatever its device and source.
        if not self._change(pod, "add", index, {errno.EEXIST}) and self.missing(pod):
            self._replace(pod, index)
        return self

    def _replace(self, pod: Pod, index: int) -> None:
        """Go to the place of one of our form; what is of another form is somebody else's."""
        routes = _routes_in(pod.netns, type(self), ipv6=self.ipv6)
        if not any(route is not None and route.metric == self.metric for route in routes):
            raise FileExistsError(errno.EEXIST, f"table {self.table} holds another such route")
        self._change(pod, "replace", index, ())

    def takes_over(self, earlier: Step) -> bool:
        """One of the same metric: the kernel exchanges them at one moment."""
        return (
            isinstance(earlier, Route)
            and self.kind == earlier.kind
            and (self.ipv6, self.metric) == (earlier.ipv6, earlier.metric)
            and self != earlier
        )

    def undo(self, pod: Pod) -> None:
        index = self._device_index(pod)
        if index is not None:  # else the device took its routes along
            self._change(pod, "del", index, _GONE)

    def missing(self, pod: Pod) -> str | None:
        routes = _routes_in(pod.netns, type(self), ipv6=self.ipv6)
        return None if self in routes else "the route is gone"

    def _device_index(self, pod: Pod) -> int | None:
        indices = {name: index for index, name in device_names(pod.netns).items()}
        return indices.get(self.device)

    def _change(self, pod: Pod, verb: str, index: int, harmless: Container[int]) -> bool:
        family, scope = _family(ipv6=self.ipv6), 0 if self.ipv6 else _HOST_SCOPE
        route = route_socket.Route(
            self.table, _LOCAL, self.destination, index, self.source, self.metric
        )
        return change(pod.netns, lambda k: k.change_route(verb, family, route, scope), harmless)


@step
@dataclass(frozen=True, slots=True)
class SlotRoute(Route):
    """A route to the addresses that stand for resolvers, with the source the app gets for them.

    They are in the kernel's own table of local addresses: what is sent to them carries no mark.
    """

    kind: ClassVar[str] = "slot-route"
    table: ClassVar[int] = _LOCAL_TABLE
    destinations: ClassVar[tuple[str, str]] = (
        f"{DNS_SLOTS_V4}/{32 - _SLOT_BITS}",
        f"{DNS_SLOTS_V6}/{128 - _SLOT_BITS}",
    )


@dataclass(frozen=True, slots=True)
class _MarkRule:
    """A rule of one family on the mark: what it does, in numbers and in words."""

    kind: ClassVar[str]
    stage: ClassVar[Stage] = Stage.APPLY
    priority: ClassVar[int]
    action: ClassVar[int]
    table: ClassVar[int] = 0
    verb: ClassVar[str]

    ipv6: bool

    def describe(self) -> str:
        mark = f"{LOOPBACK_MARK:#x}/{MARK_MASK:#x}"
        return f"{_ip(ipv6=self.ipv6)} rule add fwmark {mark} pref {self.priority} {self.verb}"

    def apply(self, pod: Pod) -> Self:
        self._change(pod, "add", {errno.EEXIST})
        return self

    def undo(self, pod: Pod) -> None:
        self._change(pod, "del", _GONE)

    def missing(self, pod: Pod) -> str | None:
        rules = [rule for rule, _ in _rules_in(pod.netns, ipv6=self.ipv6)]
        return None if self in rules else "the rule is gone"

    def _change(self, pod: Pod, verb: str, harmless: Container[int]) -> None:
        family = _family(ipv6=self.ipv6)
        change(pod.netns, lambda k: k.change_rule(verb, family, self._wanted()), harmless)

    @classmethod
    def _wanted(cls) -> route_socket.Rule:
        return route_socket.Rule(cls.priority, LOOPBACK_MARK, MARK_MASK, cls.action, cls.table)


@step
@dataclass(frozen=True, slots=True)
class Rule(_MarkRule):
    """The rule that sends the mark to our table."""

    kind: ClassVar[str] = "rule"
    priority: ClassVar[int] = RULE_PRIORITY
    action: ClassVar[int] = _TO_TABLE
    table: ClassVar[int] = ROUTE_TABLE
    verb: ClassVar[str] = f"lookup {ROUTE_TABLE}"


@step
@dataclass(frozen=True, slots=True)
class UnreachableRule(_MarkRule):
    """The rule behind it: what is marked and found no route in our table goes nowhere."""

    kind: ClassVar[str] = "unreachable-rule"
    priority: ClassVar[int] = RULE_PRIORITY + 1
    action: ClassVar[int] = _UNREACHABLE
    verb: ClassVar[str] = "unreachable"


def delivery(network: PodNetwork, *, connects: bool) -> tuple[Step, ...]:
    """What delivers the mark inside the pod, for each family it has.

    `connects` tells that apps' own sockets carry the mark, so that the source must be chosen and
    device-bound sockets count; without it only replies do, and the route by lo is enough. It is the
    same one wherever possible: a pod may change over from one kind of backend to the other.
    """
    steps: list[Step] = []
    for ipv6 in (False, True) if network.has_ipv6 else (False,):
        if connects:
            steps += _routes(network, ipv6=ipv6)
        else:
            steps.append(_by_loopback(network.primary(ipv6=ipv6), ipv6=ipv6))
        steps += [Rule(ipv6), UnreachableRule(ipv6)] if connects else [Rule(ipv6)]
    return tuple(steps)


def _by_loopback(source: str | None, *, ipv6: bool) -> Route:
    return Route(ipv6, "lo", source, LOOPBACK_METRIC)


def _routes(network: PodNetwork, *, ipv6: bool) -> list[Route]:
    source = network.primary(ipv6=ipv6)
    if source is None:
        return []
    usable = [d for d in network.devices if not (ipv6 and d in network.ipv4_only)]
    return [
        _by_loopback(source, ipv6=ipv6),
        *(
            Route(ipv6, d, network.primary(ipv6=ipv6, device=d), DEVICE_METRIC + n)
            for n, d in enumerate(usable)
        ),
    ]


def foreign(netns: Netns, recorded: Iterable[Step] = ()) -> list[str]:
    """What stands in the place of our routes and rules and is not of our record."""
    ours = tuple(recorded)
    found: list[tuple[Route | Rule | UnreachableRule | None, str]] = []
    with session(netns):
        for ipv6 in (False, True):
            routes = _routes_in(netns, Route, ipv6=ipv6)
            found += [(r, f"a route in table {ROUTE_TABLE}") for r in routes]
            found += [(r, f"the ip rule {where}") for r, where in _rules_in(netns, ipv6=ipv6)]
    return [what for step, what in found if step is None or step not in ours]


def _routes_in(netns: Netns, kind: type[Route], *, ipv6: bool) -> list[Route | None]:
    """The routes of a kind's table; None for one that is not of its form."""
    with routes(netns) as kernel:
        found = kernel.routes(_family(ipv6=ipv6), kind.table)
    devices = device_names(netns) if found else {}
    return [_route_of(route, kind, devices, ipv6=ipv6) for route in found]


def _rules_in(netns: Netns, *, ipv6: bool) -> list[tuple[Rule | UnreachableRule | None, str]]:
    """The rules in the place of ours, and which; None for one that is not of our form."""
    with routes(netns) as kernel:
        present = kernel.rules(_family(ipv6=ipv6))
    rules = []
    for rule in present:
        found = _rule_of(rule, ipv6=ipv6)
        if found or rule.priority == RULE_PRIORITY or rule.table == ROUTE_TABLE:
            rules.append((found, f"pref {rule.priority} lookup {rule.table}"))
    return rules


def _route_of(
    route: route_socket.Route, kind: type[Route], devices: dict[int, str], *, ipv6: bool
) -> Route | None:
    found = kind(ipv6, devices.get(route.device, ""), route.source, route.metric)
    is_ours = route.kind == _LOCAL and route.destination == found.destination
    return found if is_ours else None


def _rule_of(rule: route_socket.Rule, *, ipv6: bool) -> Rule | UnreachableRule | None:
    for kind in (Rule, UnreachableRule):
        wanted = kind._wanted()  # noqa: SLF001 - of this module
        # Of a rule that sends nowhere the kernel may name any table.
        if rule == (wanted if wanted.table else wanted._replace(table=rule.table)):
            return kind(ipv6)
    return None
