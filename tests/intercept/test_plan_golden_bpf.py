"""Plans of backend `bpf`, word for word: what `--dry-run` prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyambient.intercept.bpf import Bpf
from pyambient.intercept.interface import (
    Plan,
    Pod,
    PodAddress,
    PodNetwork,
    Site,
    from_record,
    to_record,
)
from pyambient.intercept.loader import Constants
from pyambient.intercept.options import CaptureOptions
from pyambient.netns import Netns

from .test_plan_golden_netfilter import DUAL_STACK, GOLDEN, MOVED, V4_ONLY, VARIANTS

_SITE = Site(Path("/run/pyambient"), Path("/sys/fs/bpf/pyambient"), Path("/sys/fs/cgroup"))
_THIS = Constants(has_ingress_ifindex=True, has_set_retval=True)
_TWO_DEVICES = PodNetwork(
    (*DUAL_STACK.addresses, PodAddress("10.0.2.2", "eth1")), ("eth0", "eth1"), has_ipv6=True
)
_NETWORKS = {"v4-only": V4_ONLY, "two-devices": _TWO_DEVICES, "moved-ports": MOVED}
# What a variant says, and its file says it.
_CHOICES: dict[str, dict[str, Any]] = {
    "dual-stack": {},
    "v4-only": {},
    "two-devices": {},
    "moved-ports": {},
    "ingress": VARIANTS["ingress"],
    "excluded": VARIANTS["excluded"],
    "included": VARIANTS["included"],
    "guard-off": {"guard": "off"},
    "guard-node": {"guard_node": True},
    "dns-off": {"dns": False},
}


def _plan(which: str, constants: Constants = _THIS) -> Plan:
    options = CaptureOptions.from_json(_CHOICES[which])
    with Netns.own() as netns:
        network = _NETWORKS.get(which, DUAL_STACK)
        return Bpf(_SITE, constants).plan(Pod("any", netns), network, options)


@pytest.mark.parametrize("which", _CHOICES)
def test_a_plan_reads_as_its_golden_file(which: str) -> None:
    """Every step, in its order and stage; no cookie, inode or other number of this machine."""
    assert _plan(which).render() == (GOLDEN / f"bpf-{which}.txt").read_text()


def test_the_plan_before_linux_5_17_reads_as_its_golden_file() -> None:
    """A filter on lo stands in for what sk_lookup cannot read there."""
    rendered = _plan("dual-stack", Constants()).render()
    assert rendered == (GOLDEN / "bpf-before-5.17.txt").read_text()


@pytest.mark.parametrize("which", _CHOICES)
def test_a_plan_survives_the_record(which: str) -> None:
    """Written to disk and read back, a plan's steps are equal, and in the order of their stages."""
    steps = _plan(which).steps
    assert from_record(json.loads(json.dumps(to_record(steps)))) == steps
    assert [step.stage for step in steps] == sorted(step.stage for step in steps)
