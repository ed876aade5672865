"""The runner on real pods: stages, rollback, the difference of two plans, findings."""

from __future__ import annotations

import dataclasses

import pytest

from pyambient.errors import PyambientError
from pyambient.intercept.interface import (
    Interceptor,
    Plan,
    PodNetwork,
    Stage,
    Step,
    from_record,
    to_record,
)
from pyambient.intercept.iptables import InboundRedirect, Iptables, NftTables, OutboundRedirect
from pyambient.intercept.runner import StepFailed, apply_stages, refresh, undo_stages, verify
from pyambient.intercept.survey import survey
from pyambient.intercept.sysctl import ReservedPorts, Sysctl
from tests.bed import Bed, BedPod, kernel_state

from .netfilter_mesh import target

# Rules that the tools and the kernel refuse, each in its own way.
UNKNOWN_MATCH = OutboundRedirect(False, "nft", ("-A ISTIO_OUTPUT -m nosuch -j ACCEPT",))
NO_SUCH_TARGET = OutboundRedirect(True, "nft", ("-A ISTIO_OUTPUT -p tcp -j NOWHERE",))
REFUSED_BY_KERNEL = OutboundRedirect(
    False, "legacy", ("-A ISTIO_OUTPUT -p tcp -j TPROXY --on-port 15001",)
)
NO_SUCH_TOOL = InboundRedirect(False, "nosuch", ())
NOTHING = PodNetwork((), (), has_ipv6=False)


def _steps(pod: BedPod, interceptor: Interceptor | None = None) -> tuple[Step, ...]:
    return (interceptor or Iptables("nft")).plan(target(pod), survey(pod.netns)).steps


def test_stages_are_applied_one_by_one_and_undone_in_any_split(
    bed: Bed, interceptor: Interceptor
) -> None:
    """What a stage adds is in place after it, and the rest is not."""
    pod, other = bed.pod("a"), bed.pod("b")
    before = kernel_state(pod, other)
    steps = _steps(pod, interceptor)
    recorded: tuple[Step, ...] = ()
    for stage in Stage:
        recorded += apply_stages(target(pod), steps, {stage})
        assert verify(target(pod), recorded) == []
        later = [s for s in steps if s.stage > stage and not isinstance(s, NftTables)]
        assert len(verify(target(pod), later)) == len(later)

    undo_stages(target(pod), recorded, (Stage.STEER, Stage.GATE))
    kept = [step for step in recorded if step.stage < Stage.STEER]
    assert verify(target(pod), kept) == []
    undo_stages(target(pod), kept)
    assert kernel_state(pod, other) == before


@pytest.mark.parametrize("broken", [UNKNOWN_MATCH, NO_SUCH_TARGET, REFUSED_BY_KERNEL, NO_SUCH_TOOL])
def test_a_failing_step_leaves_nothing(bed: Bed, broken: Step) -> None:
    """When a step fails in the middle, all before it are undone, and one line says which."""
    pod, other = bed.pod("a"), bed.pod("b")
    # A legacy table stays once it was used, rules or not.
    pod.command("iptables-legacy", "-t", "nat", "-L")
    before = kernel_state(pod, other)
    steps = [step for step in _steps(pod) if step.stage < broken.stage]

    with pytest.raises(StepFailed) as caught:
        apply_stages(target(pod), [*steps, broken])

    assert kernel_state(pod, other) == before
    assert caught.value.steps == ()
    assert str(caught.value).startswith(f"a: '{broken.describe().splitlines()[0]}' failed: ")
    assert "\n" not in str(caught.value)


def test_a_failing_stage_leaves_the_stages_before_it(bed: Bed) -> None:
    """Stages applied by an earlier call are not touched by the failure of a later one."""
    pod = bed.pod("a")
    steps = _steps(pod)
    recorded = apply_stages(target(pod), steps, {Stage.PREPARE, Stage.APPLY})
    with pytest.raises(StepFailed):
        apply_stages(target(pod), [*steps, UNKNOWN_MATCH], {Stage.STEER, Stage.GATE})
    assert verify(target(pod), recorded) == []
    assert "redirect" not in pod.command("nft", "list", "ruleset")


def test_undoing_never_stops_at_a_failure(bed: Bed) -> None:
    """All that can be undone is; the error names the rest in one line and holds it."""
    pod, other = bed.pod("a"), bed.pod("b")
    before = kernel_state(pod, other)
    recorded = apply_stages(target(pod), _steps(pod))
    stuck = dataclasses.replace(NO_SUCH_TOOL, ipv6=True)

    with pytest.raises(StepFailed) as caught:
        undo_stages(target(pod), (*recorded, NO_SUCH_TOOL, stuck))

    assert kernel_state(pod, other) == before
    assert caught.value.steps == (NO_SUCH_TOOL, stuck)
    assert "there is no iptables-nosuch-save" in str(caught.value)
    assert "there is no ip6tables-nosuch-save" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_partial_undo_keeps_the_other_stages_in_the_error(bed: Bed) -> None:
    """What the record must hold after a failure includes the stages that were not asked for."""
    pod = bed.pod("a")
    reserved = apply_stages(target(pod), [ReservedPorts()])
    with pytest.raises(StepFailed) as caught:
        undo_stages(target(pod), (*reserved, NO_SUCH_TOOL), {Stage.STEER})
    assert caught.value.steps == (*reserved, NO_SUCH_TOOL)


def test_an_unsupported_feature_keeps_its_exit_code(bed: Bed) -> None:
    """A step's own error decides how the command line ends, and what to do next."""
    pod = bed.pod("a")
    with pytest.raises(StepFailed) as caught:
        apply_stages(target(pod), [Sysctl("net.ipv4.no_such_thing", "1")])
    assert caught.value.exit_code == PyambientError.exit_code
    assert caught.value.then == "see 'pyambient check' for a backend that this kernel can do"


def test_refresh_is_the_difference_of_two_plans(bed: Bed) -> None:
    """Vanished steps are undone, added ones applied, the others keep what they remember."""
    pod, other = bed.pod("a"), bed.pod("b")
    before = kernel_state(pod, other)
    kept, gone, added = (
        Sysctl(f"net.ipv4.{name}", "1")
        for name in ("tcp_fwmark_accept", "fwmark_reflect", "ip_forward")
    )
    recorded = apply_stages(target(pod), [kept, gone])

    refreshed = refresh(target(pod), recorded, Plan("any", NOTHING, (added, kept)))

    assert refreshed == (added, kept)
    assert [step.previous for step in refreshed] == ["0", "0"]
    assert verify(target(pod), refreshed) == []
    assert gone.missing(target(pod)) == "net.ipv4.fwmark_reflect is 0"
    undo_stages(target(pod), refreshed)
    assert kernel_state(pod, other) == before


def test_refresh_without_a_difference_touches_nothing(bed: Bed) -> None:
    """The same plan again is no work: not even a lost step is put back."""
    pod = bed.pod("a")
    plan = Iptables("nft").plan(target(pod), survey(pod.netns))
    recorded = apply_stages(target(pod), plan.steps)
    pod.command("iptables-nft", "-t", "nat", "-F", "ISTIO_OUTPUT")
    assert refresh(target(pod), recorded, plan) == recorded
    assert len(verify(target(pod), recorded)) == 1


def test_a_failing_refresh_says_what_is_there_now(bed: Bed) -> None:
    """The error carries what was kept, so that the next refresh starts from the truth."""
    pod = bed.pod("a")
    recorded = apply_stages(target(pod), [ReservedPorts(), Sysctl("net.ipv4.fwmark_reflect", "1")])
    plan = Plan("any", NOTHING, (ReservedPorts(), UNKNOWN_MATCH))
    with pytest.raises(StepFailed) as caught:
        refresh(target(pod), recorded, plan)
    assert caught.value.steps == (ReservedPorts(),)
    assert caught.value.steps[0].added == ReservedPorts().ports


def test_verify_names_what_is_missing(bed: Bed) -> None:
    """Each lost rule, route and sysctl is one line; applying the steps again repairs it."""
    pod = bed.pod("a")
    recorded = apply_stages(target(pod), _steps(pod))
    assert verify(target(pod), recorded) == []

    pod.ip("rule del pref 32764", "route flush table 100")
    pod.command("iptables-nft", "-t", "nat", "-D", "ISTIO_OUTPUT", "6")
    pod.command("ip6tables-nft", "-t", "mangle", "-F")
    pod.command("sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=15001")

    lost = "! -d 127.0.0.1 -p tcp --syn -m mark ! --mark 0x539/0xfff"
    findings = verify(target(pod), recorded)
    assert [line.rpartition(": ")[2] for line in findings] == [
        "15006,15008,15053",
        "the route is gone",
        "the rule is gone",
        "no rule -A PREROUTING -j ISTIO_PRERT",
        f"no rule -A ISTIO_OUTPUT {lost} -j REDIRECT --to-ports 15001",
    ]
    assert apply_stages(target(pod), recorded) == recorded
    assert verify(target(pod), recorded) == []


def test_a_record_undoes_as_the_steps_do(bed: Bed, interceptor: Interceptor) -> None:
    """Steps written to disk and read by another process take everything away."""
    pod, other = bed.pod("a"), bed.pod("b")
    before = kernel_state(pod, other)
    recorded = from_record(to_record(apply_stages(target(pod), _steps(pod, interceptor))))
    undo_stages(target(pod), recorded)
    assert kernel_state(pod, other) == before


def test_a_plan_that_was_never_applied_undoes_nothing(bed: Bed, interceptor: Interceptor) -> None:
    """Undoing steps that a crash kept from being applied leaves the pod's own state alone."""
    pod, other = bed.pod("a"), bed.pod("b")
    pod.command("iptables-nft", "-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.9", "-j", "ACCEPT")
    pod.command("iptables-nft", "-t", "nat", "-F", "OUTPUT")
    before = kernel_state(pod, other)
    undo_stages(target(pod), _steps(pod, interceptor))
    assert kernel_state(pod, other) == before


# Applied in turn in the same chain; each accepts what the next one does not.
_SOME = OutboundRedirect(False, "nft", ("-A ISTIO_OUTPUT -p tcp -m mark --mark 0x1 -j ACCEPT",))
_MORE = OutboundRedirect(False, "nft", (*_SOME.rules, "-A ISTIO_OUTPUT -p udp -j ACCEPT"))


def _rules(pod: BedPod) -> list[str]:
    saved = pod.command("iptables-nft-save", "-t", "nat").splitlines()
    return [line for line in saved if line.startswith("-A") and "ISTIO_" in line]


@pytest.mark.parametrize(("earlier", "later"), [(_SOME, _MORE), (_MORE, _SOME)])
def test_a_step_that_takes_over_is_applied_over_the_earlier_one(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, earlier: Step, later: Step
) -> None:
    """Nothing is undone, so that there is no moment without; rules come and go."""
    pod = bed.pod("a")
    recorded = apply_stages(target(pod), (earlier,))
    monkeypatch.setattr(OutboundRedirect, "undo", lambda *_: pytest.fail("undone"))

    steps = refresh(target(pod), recorded, Plan("iptables", NOTHING, (later,)))

    assert steps == (later,)
    assert len(_rules(pod)) == 1 + len(later.rules)


def test_a_change_that_fails_leaves_the_earlier_step(bed: Bed) -> None:
    """In the pod, and in what has to be recorded."""
    pod = bed.pod("a")
    recorded = apply_stages(target(pod), (ReservedPorts(), _SOME))
    before = _rules(pod)
    plan = Plan("iptables", NOTHING, (*recorded[:1], UNKNOWN_MATCH))
    with pytest.raises(StepFailed) as failure:
        refresh(target(pod), recorded, plan)
    assert failure.value.steps == recorded
    assert _rules(pod) == before


def test_a_change_that_was_cut_off_is_completed(bed: Bed) -> None:
    """A record with the step before and the one after does not tell which is in place."""
    pod = bed.pod("a")
    apply_stages(target(pod), (_MORE,))
    steps = refresh(target(pod), (_MORE, _SOME), Plan("iptables", NOTHING, (_SOME,)))
    assert steps == (_SOME,)
    assert len(_rules(pod)) == 1 + len(_SOME.rules)
