"""Plans of backend `iptables`, word for word: what `--dry-run` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyambient.intercept.interface import Plan, Pod, PodAddress, PodNetwork, from_record, to_record
from pyambient.intercept.iptables import Iptables
from pyambient.netns import Netns

GOLDEN = Path(__file__).parent / "golden"
DUAL_STACK = PodNetwork(
    (PodAddress("10.0.1.2", "eth0"), PodAddress("fd00:1::2", "eth0")), ("eth0",), has_ipv6=True
)
V4_ONLY = PodNetwork((PodAddress("10.0.1.2", "eth0"),), ("eth0",), False, ("eth0",))
TWO_DEVICES = PodNetwork(
    (*DUAL_STACK.addresses, PodAddress("10.0.2.2", "eth1")), ("eth0", "eth1"), has_ipv6=True
)


def _plan(network: PodNetwork, variant: str = "nft") -> Plan:
    with Netns.own() as netns:
        return Iptables(variant).plan(Pod("any", netns), network)


@pytest.mark.parametrize(
    ("name", "network", "variant"),
    [
        ("iptables-dual-stack", DUAL_STACK, "nft"),
        ("iptables-v4-only", V4_ONLY, "nft"),
        ("iptables-legacy-v4-only", V4_ONLY, "legacy"),
    ],
)
def test_a_plan_reads_as_its_golden_file(name: str, network: PodNetwork, variant: str) -> None:
    """Every rule, in its order and stage."""
    assert _plan(network, variant).render() == (GOLDEN / f"{name}.txt").read_text()


def test_devices_do_not_matter() -> None:
    """Netfilter's rules name no device, so one more changes nothing."""
    assert _plan(TWO_DEVICES).steps == _plan(DUAL_STACK).steps


def test_steps_are_in_the_order_of_their_stages() -> None:
    """A plan is in the order of application, as `--dry-run` shows it."""
    stages = [step.stage for step in _plan(DUAL_STACK).steps]
    assert stages == sorted(stages)


def test_a_plan_survives_the_record() -> None:
    """Written to disk and read back, a plan's steps are equal."""
    steps = _plan(DUAL_STACK).steps
    assert from_record(to_record(steps)) == steps
