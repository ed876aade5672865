"""What the interception of a pod would do to a connection, rule by rule; pure functions.

The rules are those of bpf/connect.bpf.c, bpf/redirect.bpf.c and bpf/lookup.bpf.c, and of
`netfilter`, in their order. What they hand to the proxy ends as CAPTURED here: the proxy explains
the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pyambient.model.address import SocketAddress, is_loopback
from pyambient.model.backends import NETFILTER
from pyambient.model.explained import End, Explanation, Finding, Outcome, Ruled
from pyambient.model.numbers import (
    DNS_PORT,
    HBONE_PORT,
    INBOUND_PORT,
    LOOPBACK_MARK,
    OUTBOUND_PORT,
    PROBE_ADDRESS_V4,
    PROBE_ADDRESS_V6,
    RESOLVER_PORT,
    ROUTE_TABLE,
)
from pyambient.model.ports import WELL_KNOWN, Ports

from .options import CaptureOptions
from .selection import Ruling, Selection

_PROBES: Final = (PROBE_ADDRESS_V4, PROBE_ADDRESS_V6)


@dataclass(frozen=True, slots=True)
class Interception:
    """What decides about a pod's connections, as it is now.

    `problem` says why nothing is captured yet, or any more; empty while the pod is enrolled.
    `dns` tells whether it captures the pod's DNS, over UDP as well. `devices` are those whose
    routes capture bound sockets, with `tc` those that have a redirect, each as (name, is it for
    IPv6); `guarded` have a guard that drops what goes past the capture, `fenced` tells that so does
    something at all other devices. `routed` tells for which family (True: IPv6) marked packets are
    delivered on lo. `listeners` are the well-known ports for which the proxy listens, `ports` where
    that is.
    """

    backend: str
    problem: str
    addresses: frozenset[str]
    options: CaptureOptions
    dns: bool
    devices: frozenset[tuple[str, bool]]
    guarded: frozenset[str]
    fenced: bool
    routed: frozenset[bool]
    listeners: frozenset[int]
    ports: Ports = WELL_KNOWN

    @property
    def netfilter(self) -> bool:
        return self.backend in NETFILTER

    @property
    def at_devices(self) -> bool:
        """Whether packets are captured where they leave, not sockets where they connect."""
        return self.backend == "tc"

    def place_of(self, port: int) -> int:
        """What stands for a well-known port in this pod."""
        return self.ports.moved.get(port, port)

    def has(self, ip: str) -> bool:
        """Whether the address is one of the pod's own."""
        return ip.partition("%")[0] in self.addresses


def explain_outbound(pod: Interception, to: SocketAddress, device: str = "") -> Explanation:
    """A TCP connection of an app to `to`, or a query to port 53.

    `device` is what the app has bound its socket to.
    """
    return Explanation.of(_outbound(pod, to, device))


def _outbound(pod: Interception, to: SocketAddress, device: str) -> Iterator[Ruled]:
    yield _enrolled(pod)
    yield _inside(pod, to.ip)
    if pod.at_devices:
        yield _redirected(pod, device, ipv6=to.is_ipv6)
    yield _selected("outbound", pod.options.outbound, to.ip, to.port)
    if device and not pod.at_devices:
        yield _bound(pod, device, ipv6=to.is_ipv6)
    if not pod.netfilter:
        yield _route(pod, ipv6=to.is_ipv6)
    is_query = to.port == RESOLVER_PORT and pod.dns
    yield _dns(pod, to.port)
    otherwise = "its connect is refused"
    if is_query and pod.backend == "tc":
        otherwise += ", a query by UDP is dropped"
    yield _listener(pod, DNS_PORT if is_query else OUTBOUND_PORT, otherwise)
    if is_query:
        why = f"the proxy asks {to.ip} itself, by UDP or TCP as the app did, and answers as {to}"
        yield Finding("forwarder", True, why), End(Outcome.FORWARDED, f"{why} (DNS is no tunnel)")
    yield _handed_over(pod, OUTBOUND_PORT)


def explain_inbound(pod: Interception, source: str, to: SocketAddress) -> Explanation:
    """A TCP connection of `source`, an address, to `to`, one of the pod's own."""
    return Explanation.of(_inbound(pod, source, to))


def _inbound(pod: Interception, source: str, to: SocketAddress) -> Iterator[Ruled]:
    yield _enrolled(pod)
    yield _to_pod(pod, to)
    yield _inside(pod, source)
    if to.port == HBONE_PORT:
        yield Finding("HBONE", True, f"port {HBONE_PORT} is the proxy's on every address"), None
        yield _listener(pod, HBONE_PORT, "it is refused")
        yield _handed_over(pod, HBONE_PORT)
    yield _bypassed(pod)
    yield _selected("inbound", pod.options.inbound, source, to.port)
    yield _probe(pod, source)
    yield _listener(pod, INBOUND_PORT, "it is refused")
    yield _handed_over(pod, INBOUND_PORT)


def _enrolled(pod: Interception) -> Ruled:
    if pod.problem:
        end = End(Outcome.DIRECT, f"not captured: {pod.problem}")
        return Finding("enrolled", False, pod.problem), end
    return Finding("enrolled", True, f"with backend {pod.backend}"), None


def _to_pod(pod: Interception, to: SocketAddress) -> Ruled:
    own = " ".join(sorted(pod.addresses))
    if pod.has(to.ip):
        return Finding("own address", True, f"{to.ip} is the pod's"), None
    found = f"{to.ip} is none of the pod's ({own})"
    return Finding("own address", False, found), End(Outcome.REFUSED, found)


def _inside(pod: Interception, ip: str) -> Ruled:
    rule = "the pod to itself"
    if is_loopback(ip) or pod.has(ip):
        kind = "a loopback address" if is_loopback(ip) else "the pod's own address"
        found = f"{ip} is {kind}"
        return Finding(rule, True, found), End(Outcome.DIRECT, f"not captured: {found}")
    return Finding(rule, False, f"{ip} is neither loopback nor the pod's own"), None


def _selected(direction: str, selection: Selection, ip: str, port: int) -> Ruled:
    ruling: Ruling = selection.ruling(ip, port)
    finding = Finding(f"{direction} selection", ruling.captured, ruling.why)
    if ruling.captured:
        return finding, None
    return finding, End(Outcome.DIRECT, f"not captured, as the pod's options say: {ruling.why}")


def _bound(pod: Interception, device: str, *, ipv6: bool) -> Ruled:
    rule, family = f"bound to {device}", "IPv6" if ipv6 else "IPv4"
    if pod.netfilter:
        found = f"backend {pod.backend} captures no socket that is bound to a device"
        return Finding(rule, False, found), End(Outcome.REFUSED, f"it hangs: {found}")
    if device == "lo" or (device, ipv6) in pod.devices:
        return Finding(rule, True, f"{device} has its route for captured {family} sockets"), None
    found = f"{device} has no route for captured {family} sockets"
    return Finding(rule, False, found), End(Outcome.REFUSED, f"its connect is refused: {found}")


def _redirected(pod: Interception, device: str, *, ipv6: bool) -> Ruled:
    """With tc it counts by which device a packet leaves; a bound socket is one of any other."""
    rule = "redirect"
    there = {name for name, for_ipv6 in pod.devices if for_ipv6 is ipv6}
    if device in there or (there and not device):
        where = device or " ".join(sorted(there))
        return Finding(rule, True, f"TCP that leaves by {where}, whose ever, goes back by lo"), None
    found, end = _not_redirected(pod, device)
    return Finding(rule, False, found), end


def _not_redirected(pod: Interception, device: str) -> tuple[str, End]:
    if device == "lo":
        found = "nobody takes what is sent to others by lo"
        return found, End(Outcome.REFUSED, f"it goes nowhere: {found}")
    where = device or "any device"
    if device in pod.guarded or (pod.guarded and not device):
        found = f"there is none at {where}, and the guard drops what has not passed one"
        return found, End(Outcome.REFUSED, f"it hangs: {found}")
    found = f"there is none at {where}, which the agent has not seen yet"
    if pod.fenced:
        return found, End(Outcome.REFUSED, f"it hangs until the agent has: {found}")
    return found, End(Outcome.DIRECT, f"not captured: {found}")


def _route(pod: Interception, *, ipv6: bool) -> Ruled:
    rule, family = "route", "IPv6" if ipv6 else "IPv4"
    if ipv6 in pod.routed:
        found = f"{family} marked {LOOPBACK_MARK:#x} is delivered on lo by table {ROUTE_TABLE}"
        return Finding(rule, True, found), None
    found = f"table {ROUTE_TABLE} delivers no {family}, as the pod has no address or lost a route"
    what = "it hangs" if pod.at_devices else "its connect is refused"
    return Finding(rule, False, found), End(Outcome.REFUSED, f"{what}: {found}")


def _dns(pod: Interception, port: int) -> Ruled:
    if port != RESOLVER_PORT:
        return Finding("DNS", False, f"port {port} is not {RESOLVER_PORT}"), None
    if not pod.dns:
        found = "the pod's DNS is not captured: UDP leaves as it is, TCP is like any other"
        return Finding("DNS", False, found), None
    return Finding("DNS", True, f"port {RESOLVER_PORT} goes to the proxy's forwarder"), None


def _listener(pod: Interception, port: int, otherwise: str) -> Ruled:
    where = str(pod.place_of(port))
    if port in pod.ports.moved:
        where += f", as somebody had {port}"
    if port in pod.listeners:
        return Finding("listener", True, f"the proxy listens on {where}"), None
    found = f"nobody listens on {where}: no proxy serves the pod"
    return Finding("listener", False, found), End(Outcome.REFUSED, f"{otherwise}: {found}")


def _bypassed(pod: Interception) -> Ruled:
    rule = "bypass of inbound capture"
    if pod.options.bypass_inbound:
        found = "nothing but HBONE is captured of what comes in"
        return Finding(rule, True, found), End(Outcome.DIRECT, f"not captured: {found}")
    return Finding(rule, False, "it is not chosen"), None


def _probe(pod: Interception, source: str) -> Ruled:
    """With netfilter a probe is known by its address; with the others by its socket."""
    rule = "health probe of the node"
    if not pod.netfilter:
        found = "a connection of the node's own processes passes; an address does not tell them"
        return Finding(rule, False, found), None
    if source in _PROBES:
        found = f"{source} is the address of the node's probes"
        return Finding(rule, True, found), End(Outcome.DIRECT, f"not captured: {found}")
    return Finding(rule, False, f"{source} is not the address of the node's probes"), None


def _handed_over(pod: Interception, port: int) -> Ruled:
    place = pod.place_of(port)
    how = "redirected" if pod.netfilter and place != HBONE_PORT else "handed"
    found = f"it is {how} to the proxy on {place}"
    return Finding("captured", True, found), End(Outcome.CAPTURED, found)
