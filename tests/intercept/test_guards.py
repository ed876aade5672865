"""Which guards a plan ends with, and which choices are refused."""

from __future__ import annotations

import pytest

from pyambient.errors import UsageError
from pyambient.intercept.guards import guards, refuse_guard_node
from pyambient.intercept.interface import PodNetwork, Stage, from_record, to_record
from pyambient.intercept.options import CaptureOptions

_NETWORK = PodNetwork((), ("eth0", "eth1"), has_ipv6=True)


@pytest.mark.parametrize(
    ("mode", "on_node", "kinds"),
    [
        ("drop", False, ["bpf-guard"] * 2),
        ("count", False, ["bpf-guard"] * 2),
        ("drop", True, ["bpf-guard"] * 2 + ["bpf-guard-node"] * 2),
        ("count", True, ["bpf-guard"] * 2 + ["bpf-guard-node"] * 2),
        ("off", False, []),
    ],
)
def test_the_guards_of_a_plan(mode: str, *, on_node: bool, kinds: list[str]) -> None:
    """One on each device, then one behind each; all after the gate, all fit for a record."""
    steps = guards("/bpffs", 7, _NETWORK, CaptureOptions(guard=mode, guard_node=on_node))
    assert [step.kind for step in steps] == kinds
    assert {step.stage for step in steps} <= {Stage.GATE}
    assert from_record(to_record(steps)) == steps
    assert all(getattr(step, "counts_only", None) is (mode == "count") for step in steps)


@pytest.mark.parametrize(
    "chosen", [{"guard": "sometimes"}, {"guard": "off", "guard_node": True}, {"guard": True}]
)
def test_choices_that_are_none(chosen: dict[str, object]) -> None:
    """In one line, before anything is done."""
    with pytest.raises(UsageError):
        CaptureOptions.from_json(chosen)


def test_a_backend_without_a_guard() -> None:
    """The node's guard would drop everything."""
    refuse_guard_node("iptables", CaptureOptions())
    with pytest.raises(UsageError, match="backend iptables has no guard"):
        refuse_guard_node("iptables", CaptureOptions(guard_node=True))
