"""What is said of a connection before the proxy gets it: a table of rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pyambient.intercept.explain import Interception, explain_inbound, explain_outbound
from pyambient.intercept.options import CaptureOptions
from pyambient.model.address import SocketAddress
from pyambient.model.explained import Explanation, Outcome
from pyambient.model.numbers import PROBE_ADDRESS_V4, PROBE_ADDRESS_V6, RESERVED_PORTS

POD = Interception(
    backend="bpf",
    problem="",
    addresses=frozenset(("10.0.0.1", "fd00::1", "fe80::1")),
    options=CaptureOptions(),
    dns=True,
    devices=frozenset((("eth0", False), ("eth0", True), ("eth1", False))),
    guarded=frozenset(),
    fenced=False,
    routed=frozenset((False, True)),
    listeners=frozenset(RESERVED_PORTS),
)
BACKENDS = ("bpf", "tc", "nftables", "iptables")


def choosing(**options: Any) -> CaptureOptions:
    return CaptureOptions.from_json(options)


def decisive(explained: Explanation) -> str:
    return explained.findings[-1].rule


@pytest.mark.parametrize(
    ("to", "changes", "outcome", "rule"),
    [
        (("10.0.0.2", 80), {}, Outcome.CAPTURED, "captured"),
        (("fd00::2", 80), {}, Outcome.CAPTURED, "captured"),
        (("10.0.0.2", 80), {"problem": "the pod is draining"}, Outcome.DIRECT, "enrolled"),
        (("10.0.0.1", 80), {}, Outcome.DIRECT, "the pod to itself"),
        (("fe80::1%2", 80), {}, Outcome.DIRECT, "the pod to itself"),
        (("127.0.0.9", 15001), {}, Outcome.DIRECT, "the pod to itself"),
        (("::1", 53), {}, Outcome.DIRECT, "the pod to itself"),
        (
            ("10.0.0.2", 22),
            {"options": choosing(outbound={"exclude_ports": "20-25"})},
            Outcome.DIRECT,
            "outbound selection",
        ),
        (
            ("fd00::2", 80),
            {"options": choosing(outbound={"include_cidrs": "10.0.0.0/8"})},
            Outcome.DIRECT,
            "outbound selection",
        ),
        (
            ("10.0.0.2", 22),
            {"options": choosing(inbound={"exclude_ports": "22"})},
            Outcome.CAPTURED,
            "captured",
        ),
        (("10.0.0.2", 80), {"listeners": frozenset((15053,))}, Outcome.REFUSED, "listener"),
        (("10.0.0.2", 53), {"listeners": frozenset((15001,))}, Outcome.REFUSED, "listener"),
        (("10.0.0.2", 53), {}, Outcome.FORWARDED, "forwarder"),
        (("10.0.0.2", 53), {"dns": False}, Outcome.CAPTURED, "captured"),
        (
            ("10.0.0.2", 53),
            {"options": choosing(outbound={"exclude_ports": "53"})},
            Outcome.DIRECT,
            "outbound selection",
        ),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_becomes_of_a_connection_of_an_app(
    backend: str, to: tuple[str, int], changes: dict[str, Any], outcome: Outcome, rule: str
) -> None:
    """Each rule decides where it matches, with every backend alike."""
    pod = replace(POD, backend=backend, **changes)
    explained = explain_outbound(pod, SocketAddress(*to))
    assert (explained.outcome, decisive(explained)) == (outcome, rule)


@pytest.mark.parametrize(
    ("backend", "to", "device", "outcome"),
    [
        ("bpf", "10.0.0.2", "eth0", Outcome.CAPTURED),
        ("bpf", "10.0.0.2", "eth1", Outcome.CAPTURED),
        ("bpf", "fd00::2", "eth1", Outcome.REFUSED),
        ("bpf", "10.0.0.2", "eth2", Outcome.REFUSED),
        ("tc", "10.0.0.2", "eth1", Outcome.CAPTURED),
        ("tc", "10.0.0.2", "eth2", Outcome.DIRECT),
        ("tc", "10.0.0.2", "lo", Outcome.REFUSED),
        ("tc", "10.0.0.1", "lo", Outcome.DIRECT),
        ("nftables", "10.0.0.2", "eth0", Outcome.REFUSED),
        ("iptables", "fd00::2", "eth0", Outcome.REFUSED),
        ("iptables", "10.0.0.1", "eth0", Outcome.DIRECT),
    ],
)
def test_a_socket_bound_to_a_device(backend: str, to: str, device: str, outcome: Outcome) -> None:
    """The device's route captures it (bpf), its redirect (tc), if there is one; or nothing."""
    pod = replace(POD, backend=backend)
    assert explain_outbound(pod, SocketAddress(to, 80), device).outcome is outcome


@pytest.mark.parametrize(
    ("device", "guarded", "fenced", "outcome"),
    [
        ("", (), False, Outcome.DIRECT),
        ("", ("eth0",), False, Outcome.REFUSED),
        ("eth0", ("eth0",), False, Outcome.REFUSED),
        ("eth2", ("eth0",), False, Outcome.DIRECT),
        ("eth2", ("eth0",), True, Outcome.REFUSED),
        ("", (), True, Outcome.REFUSED),
    ],
)
def test_without_a_redirect_the_guard_is_left(
    device: str, guarded: tuple[str, ...], outcome: Outcome, *, fenced: bool
) -> None:
    """Backend tc: a device that lost its redirect, and one that the agent has not seen."""
    there = {"devices": frozenset(), "guarded": frozenset(guarded), "fenced": fenced}
    pod = replace(POD, backend="tc", **there)
    explained = explain_outbound(pod, SocketAddress("10.0.0.2", 80), device)
    assert (explained.outcome, decisive(explained)) == (outcome, "redirect")


def test_dns_that_is_not_captured_is_said_of_udp() -> None:
    """What the outcome says holds for TCP; over UDP such a query leaves as it is."""
    explained = explain_outbound(replace(POD, dns=False), SocketAddress("10.0.0.2", 53))
    (dns,) = [finding for finding in explained.findings if finding.rule == "DNS"]
    assert (dns.matched, "UDP leaves as it is" in dns.found) == (False, True)


@pytest.mark.parametrize(("routed", "refused"), [((True,), "10.0.0.2"), ((False,), "fd00::2")])
def test_a_family_without_a_route_is_refused(routed: tuple[bool], refused: str) -> None:
    """A marked packet that nothing delivers goes nowhere; netfilter has no mark to deliver."""
    pod = replace(POD, routed=frozenset(routed))
    for backend, what in (("bpf", "its connect is refused"), ("tc", "it hangs")):
        explained = explain_outbound(replace(pod, backend=backend), SocketAddress(refused, 80))
        assert (explained.outcome, decisive(explained)) == (Outcome.REFUSED, "route")
        assert explained.summary.startswith(what)
    for backend in ("nftables", "iptables"):
        by_redirect = replace(pod, backend=backend)
        assert explain_outbound(by_redirect, SocketAddress(refused, 80)).outcome is Outcome.CAPTURED


@pytest.mark.parametrize(
    ("source", "to", "changes", "outcome", "rule"),
    [
        ("10.0.0.2", ("10.0.0.1", 80), {}, Outcome.CAPTURED, "captured"),
        ("10.0.0.2", ("10.0.0.3", 80), {}, Outcome.REFUSED, "own address"),
        ("fd00::1", ("fd00::1", 80), {}, Outcome.DIRECT, "the pod to itself"),
        ("10.0.0.2", ("10.0.0.1", 80), {"listeners": frozenset()}, Outcome.REFUSED, "listener"),
        (
            "10.0.0.2",
            ("10.0.0.1", 80),
            {"options": choosing(bypass_inbound=True)},
            Outcome.DIRECT,
            "bypass of inbound capture",
        ),
        (
            "10.0.0.2",
            ("10.0.0.1", 15008),
            {"options": choosing(bypass_inbound=True)},
            Outcome.CAPTURED,
            "captured",
        ),
        (
            "10.0.0.2",
            ("10.0.0.1", 80),
            {"options": choosing(inbound={"exclude_cidrs": "10.0.0.2"})},
            Outcome.DIRECT,
            "inbound selection",
        ),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_becomes_of_a_connection_to_the_pod(
    backend: str,
    source: str,
    to: tuple[str, int],
    changes: dict[str, Any],
    outcome: Outcome,
    rule: str,
) -> None:
    """The same of what comes in; HBONE comes in whatever was chosen."""
    pod = replace(POD, backend=backend, **changes)
    explained = explain_inbound(pod, source, SocketAddress(*to))
    assert (explained.outcome, decisive(explained)) == (outcome, rule)


@pytest.mark.parametrize(
    ("source", "to"), [(PROBE_ADDRESS_V4, "10.0.0.1"), (PROBE_ADDRESS_V6, "fd00::1")]
)
def test_an_address_tells_probes_with_netfilter_alone(source: str, to: str) -> None:
    """With bpf and tc whoever has that address is captured like anybody else."""
    outcomes = {
        backend: explain_inbound(
            replace(POD, backend=backend), source, SocketAddress(to, 80)
        ).outcome
        for backend in BACKENDS
    }
    assert outcomes == {
        "bpf": Outcome.CAPTURED,
        "tc": Outcome.CAPTURED,
        "nftables": Outcome.DIRECT,
        "iptables": Outcome.DIRECT,
    }


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        ({"exclude_ports": "20-25"}, "port 22 is excluded by 20-25"),
        ({"include_ports": "80,443"}, "port 22 is not included (80,443)"),
        ({"exclude_cidrs": "10.0.0.0/8"}, "10.0.0.2 is excluded by 10.0.0.0/8"),
        ({"include_cidrs": "fd00::/8"}, "10.0.0.2 is not included (fd00::/8)"),
        (
            {"include_cidrs": "10.0.0.0/8"},
            "nothing excludes port 22 and 10.0.0.2, 10.0.0.2 is included by 10.0.0.0/8",
        ),
        ({}, "nothing excludes port 22 and 10.0.0.2, it is included"),
    ],
)
def test_the_choice_that_decides_is_named(choices: dict[str, str], why: str) -> None:
    """The list's very entry."""
    pod = replace(POD, options=choosing(outbound=choices))
    explained = explain_outbound(pod, SocketAddress("10.0.0.2", 22))
    assert why in [finding.found for finding in explained.findings]
