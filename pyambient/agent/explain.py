"""`pyambient explain`: what would happen to a connection of an enrolled pod, and why.

The kernel's part is known here, from the record and from what is in place at this moment; the
proxy's part it alone knows, and is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from pyambient.errors import UsageError
from pyambient.intercept import explain as interception
from pyambient.intercept.bpf_steps import CapturedDevice, OwnAddress
from pyambient.intercept.egress_guard import EgressGuard
from pyambient.intercept.explain import Interception
from pyambient.intercept.fence import Fence
from pyambient.intercept.fib import Route, Rule, SlotRoute
from pyambient.intercept.interface import Pod, Step
from pyambient.intercept.listeners import ProxyListeners, listening
from pyambient.intercept.runner import lost
from pyambient.intercept.tc_steps import Redirect
from pyambient.model.address import SocketAddress, canonical_ip
from pyambient.model.explained import Explanation, Finding, Outcome
from pyambient.model.numbers import RESERVED_PORTS
from pyambient.model.ports import Ports
from pyambient.netns import Netns
from pyambient.zds.details import Explain

from .described import details_of
from .records import Record, State

DEFAULT_PORT: Final = 80


@dataclass(frozen=True, slots=True)
class Inquiry:
    """Which connection: to `to`, by an app bound to `device`, or by the client `source`."""

    to: SocketAddress
    source: str = ""
    device: str = ""

    @classmethod
    def parse(cls, to: str, source: str = "", device: str = "") -> Self:
        """`to` is IP, IP:PORT or [IPv6]:PORT, port 80 if it names none; UsageError if not."""
        return cls(_address(to), _ip(source) if source else "", device)

    def for_proxy(self, uid: str) -> Explain:
        return Explain(uid, self.to, self.source)


def _address(text: str) -> SocketAddress:
    host, colon, port = text.rpartition(":")
    if not colon or ("]" in port) or (":" in host and not host.startswith("[")):
        return SocketAddress(_ip(text.strip("[]")), DEFAULT_PORT)
    if not (port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 1 << 16):
        raise UsageError(f"{port!r} is no port", "give a number from 1 to 65535")
    return SocketAddress(_ip(host.strip("[]")), int(port))


def _ip(text: str) -> str:
    try:
        return canonical_ip(text)
    except ValueError:
        raise UsageError(
            f"{text!r} is no IP address", "give one, as 10.77.0.3:8080 or [fd77::3]:8080"
        ) from None


def explain(record: Record, netns: Netns, inquiry: Inquiry) -> Explanation:
    """The part of it that happens before the proxy."""
    pod = observe(record, netns)
    whose = Finding("pod", True, f"{record.netns.label} is {record.pod}")
    if inquiry.source:
        found = interception.explain_inbound(pod, inquiry.source, inquiry.to)
    else:
        found = interception.explain_outbound(pod, inquiry.to, inquiry.device)
    return Explanation((whose, *found.findings), found.outcome, found.summary)


def completed(before: Explanation, proxy: Mapping[str, Any] | None) -> Explanation:
    """The whole of it, with what the proxy says if it gets the connection; None if it is silent."""
    if before.outcome is not Outcome.CAPTURED:
        return before
    if proxy is None:
        found = f"{before.summary}; no proxy of pyambient's says what it does with it"
        return Explanation(before.findings, Outcome.CAPTURED, found)
    return before.then(Explanation.from_json(proxy))


def observe(record: Record, netns: Netns) -> Interception:
    """How the pod is intercepted at this moment."""
    gone = _gone(Pod(record.pod.uid, netns), record.steps)
    steps = [step for step in record.steps if step not in gone]
    own = {step.ip.partition("%")[0] for step in steps if isinstance(step, OwnAddress)}
    return Interception(
        record.backend,
        "" if record.state is State.ENROLLED else f"the pod is {record.state.value}",
        frozenset((*own, *record.addresses)),
        record.options,
        details_of(record).dns is not None,
        _capturing_devices(steps),
        frozenset(s.device for s in steps if isinstance(s, EgressGuard) and not s.counts_only),
        any(isinstance(s, Fence) and not s.counts_only for s in steps),
        _routed(steps),
        _listeners(steps, record.ports, netns),
        record.ports,
    )


def _gone(pod: Pod, steps: Iterable[Step]) -> frozenset[Step]:
    """What is not in place any more of all that is asked for below."""
    asked = [s for s in steps if _delivers(s) or isinstance(s, Redirect | EgressGuard | Fence)]
    return frozenset(step for step, _ in lost(pod, asked))


def _delivers(step: Step) -> bool:
    """Whether it is part of what brings a marked packet to lo."""
    by_lo = isinstance(step, Route) and not isinstance(step, SlotRoute) and step.device == "lo"
    return by_lo or isinstance(step, Rule)


def _capturing_devices(steps: Iterable[Step]) -> frozenset[tuple[str, bool]]:
    """Those where sockets, with tc packets, are captured, each with the family (True: IPv6)."""
    routed = {(s.device, s.ipv6) for s in steps if isinstance(s, CapturedDevice)}
    redirected = {s.device for s in steps if isinstance(s, Redirect)}
    return frozenset(routed | set(itertools.product(redirected, (False, True))))


def _routed(steps: Iterable[Step]) -> frozenset[bool]:
    """The families that have both a rule and a route for the mark (True: IPv6)."""
    there = [step for step in steps if _delivers(step)]
    rules = {step.ipv6 for step in there if isinstance(step, Rule)}
    return frozenset(step.ipv6 for step in there if isinstance(step, Route)) & rules


def _listeners(steps: Iterable[Step], ports: Ports, netns: Netns) -> frozenset[int]:
    """The well-known ports: as the hooks see them if there are any, else as the kernel's tables."""
    for step in steps:
        if isinstance(step, ProxyListeners):
            return step.alive()
    there = {port for port, _ in listening(netns)}
    places = zip(RESERVED_PORTS, ports, strict=True)
    return frozenset(well_known for well_known, port in places if port in there)
