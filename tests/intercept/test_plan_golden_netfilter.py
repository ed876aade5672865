"""Plans of the netfilter backends, word for word: what `--dry-run` prints."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pyambient.intercept.interface import (
    Interceptor,
    Plan,
    Pod,
    PodAddress,
    PodNetwork,
    from_record,
    to_record,
)
from pyambient.intercept.options import DEFAULTS, CaptureOptions
from pyambient.model.ports import Ports
from pyambient.netns import Netns

from .netfilter_mesh import INTERCEPTORS

GOLDEN = Path(__file__).parent / "golden"
DUAL_STACK = PodNetwork(
    (PodAddress("10.0.1.2", "eth0"), PodAddress("fd00:1::2", "eth0")), ("eth0",), has_ipv6=True
)
MOVED = replace(DUAL_STACK, ports=Ports(15101, 15106, 15108, 15153))
V4_ONLY = PodNetwork((PodAddress("10.0.1.2", "eth0"),), ("eth0",), False, ("eth0",))
TWO_DEVICES = PodNetwork(DUAL_STACK.addresses, ("eth0", "eth1"), has_ipv6=True)


# Istio's own variants by its golden files' names, and ours.
VARIANTS = {
    "ingress": {"bypass_inbound": True},
    "virtual-interfaces": {"virtual_interfaces": "tap0,docker0"},
    "ingress-and-virtual-interfaces": {"bypass_inbound": True, "virtual_interfaces": "tap0"},
    "excluded": {
        "outbound": {"exclude_ports": "22,8000-8100", "exclude_cidrs": "10.96.0.0/12,fd96::/16"},
        "inbound": {"exclude_ports": "9090", "exclude_cidrs": "192.0.2.7,2001:db8::7"},
    },
    "included": {
        "outbound": {"include_cidrs": "10.0.0.0/8,fd00::/8", "exclude_cidrs": "10.96.0.0/12"},
        "inbound": {"include_ports": "80,443", "include_cidrs": "10.0.0.0/8"},
    },
}


def _plan(
    interceptor: Interceptor, network: PodNetwork, options: CaptureOptions = DEFAULTS
) -> Plan:
    with Netns.own() as netns:
        return interceptor.plan(Pod("any", netns), network, options)


@pytest.mark.parametrize(
    ("name", "backend", "network"),
    [
        ("iptables-dual-stack", "iptables-nft", DUAL_STACK),
        ("iptables-moved-ports", "iptables-nft", MOVED),
        ("iptables-v4-only", "iptables-nft", V4_ONLY),
        ("iptables-legacy-v4-only", "iptables-legacy", V4_ONLY),
        ("nftables-dual-stack", "nftables", DUAL_STACK),
        ("nftables-moved-ports", "nftables", MOVED),
        ("nftables-v4-only", "nftables", V4_ONLY),
    ],
)
def test_a_plan_reads_as_its_golden_file(name: str, backend: str, network: PodNetwork) -> None:
    """Every rule, in its order and stage."""
    assert _plan(INTERCEPTORS[backend], network).render() == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("backend", ["iptables-nft", "nftables"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_captured_reads_as_its_golden_file(variant: str, backend: str) -> None:
    """Options change the rules of steering and gate, which are in the file, and no others."""
    rendered = _plan(INTERCEPTORS[backend], DUAL_STACK, _options(variant)).render()
    name = f"{backend.removesuffix('-nft')}-{variant}.txt"
    assert _captures(rendered) == (GOLDEN / name).read_text()
    usual = _plan(INTERCEPTORS[backend], DUAL_STACK).render()
    assert rendered.removesuffix(_captures(rendered)) == usual.removesuffix(_captures(usual))


def _options(variant: str) -> CaptureOptions:
    return CaptureOptions.from_json(VARIANTS[variant])


def _captures(rendered: str) -> str:
    """The last two stages, or the one of them that there is."""
    heading = "# steer\n" if "# steer\n" in rendered else "# gate\n"
    return heading + rendered.partition(heading)[2]


@pytest.mark.parametrize("backend", ["iptables-nft", "nftables"])
def test_without_dns_capture(backend: str) -> None:
    """No rule names the resolvers' port, and nothing but the proxy's ports is different."""
    usual, without = (
        _plan(INTERCEPTORS[backend], DUAL_STACK, CaptureOptions(dns=dns)).render()
        for dns in (True, False)
    )
    left_out = set(usual.splitlines()) - set(without.splitlines())

    assert not re.search(r"\b(53|notrack)\b", without)
    assert all(re.search(r"\b(53|raw|untracked_(in|out))\b", line) for line in left_out), left_out


def test_devices_do_not_matter(interceptor: Interceptor) -> None:
    """Netfilter's rules name no device, so one more changes nothing."""
    assert _plan(interceptor, TWO_DEVICES).steps == _plan(interceptor, DUAL_STACK).steps


def test_steps_are_in_the_order_of_their_stages(interceptor: Interceptor) -> None:
    """A plan is in the order of application, as `--dry-run` shows it."""
    stages = [step.stage for step in _plan(interceptor, DUAL_STACK).steps]
    assert stages == sorted(stages)


def test_a_plan_survives_the_record(interceptor: Interceptor) -> None:
    """Written to disk and read back, a plan's steps are equal."""
    steps = _plan(interceptor, DUAL_STACK, _options("included")).steps
    assert from_record(json.loads(json.dumps(to_record(steps)))) == steps
