"""Which guards a plan ends with, and which choices are refused."""

from __future__ import annotations

import pytest

from pyambient.errors import UsageError
from pyambient.intercept.guards import guards, refuse_guard_node
from pyambient.intercept.interface import PodNetwork, Stage, from_record, to_record
from pyambient.intercept.options import CaptureOptions

_NETWORK = PodNetwork((), ("eth0", "eth1"), has_ipv6=True)
_INSIDE = ["bpf-guard"] * 2
_OUTSIDE = ["bpf-guard-node"] * 2


@pytest.mark.parametrize(
    ("mode", "on_node", "kinds"),
    [
        ("drop", False, ["bpf-guarded", *_INSIDE]),
        ("count", False, ["bpf-guarded", *_INSIDE]),
        ("drop", True, ["bpf-guarded", *_INSIDE, *_OUTSIDE]),
        ("count", True, ["bpf-guarded", *_INSIDE, *_OUTSIDE]),
        ("off", False, []),
    ],
)
def test_the_guards_of_a_plan(mode: str, *, on_node: bool, kinds: list[str]) -> None:
    """What they share, one on each device, then one behind each; all fit for a record."""
    steps = guards("/bpffs", 7, _NETWORK, CaptureOptions(guard=mode, guard_node=on_node))
    assert [step.kind for step in steps] == kinds
    assert {step.stage for step in steps} <= {Stage.GATE}
    assert from_record(to_record(steps)) == steps
    assert all(step.counts_only is (mode == "count") for step in steps[1:])


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
