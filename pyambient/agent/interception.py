"""The kernel's part of an enrolment: plans made, applied, brought up to date and undone.

All of it is synchronous. What is about to be done is on disk before it is done; what a step has to
remember for its undoing (a sysctl's previous value) is on disk right after it was applied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from pyambient.errors import PyambientError
from pyambient.intercept import probe
from pyambient.intercept.bpf_node import NodePrograms
from pyambient.intercept.choose import choose
from pyambient.intercept.egress_guard import EgressGuard
from pyambient.intercept.fingerprint import (
    fingerprint,
    node_fingerprint,
    node_tells,
    tells,
)
from pyambient.intercept.interface import (
    Interceptor,
    Plan,
    Pod,
    PodNetwork,
    Restoring,
    Site,
    Stage,
    Step,
    is_of_node,
)
from pyambient.intercept.options import CaptureOptions
from pyambient.intercept.ports import choose_ports
from pyambient.intercept.preflight import preflight
from pyambient.intercept.rtnetlink import session
from pyambient.intercept.runner import (
    StepFailed,
    apply_stages,
    lost,
    name_of,
    refresh,
    undo_stages,
)
from pyambient.intercept.survey import survey
from pyambient.model.ports import Ports
from pyambient.netns import Netns

from .enrolled import Enrolled
from .locate import find
from .records import Record, RecordStore


def load_ahead(site: Site) -> None:
    """Have ready what the node's first pod needs, where backend `bpf` works."""
    with contextlib.suppress(PyambientError, OSError):
        if site.cgroup is not None and probe.lacking(site.cgroup) is None:
            NodePrograms(site.bpffs, site.cgroup).load_ahead(probe.constants(site.cgroup))


def make_plan(pod: Pod, backend: str, site: Site, options: CaptureOptions) -> Plan:
    """What enrolling the pod would add; PyambientError if it cannot be enrolled as it is."""
    interceptor = choose(backend, site, pod.netns, options)
    preflight(pod, site, interceptor.name)
    ports = choose_ports(pod.netns)
    return interceptor.plan(pod, network_of(pod, ports), options)


def network_of(pod: Pod, ports: Ports) -> PodNetwork:
    """The pod's network as it is now, with the ports that the proxy has there."""
    return dataclasses.replace(survey(pod.netns), ports=ports)


def planned(record: Record, plan: Plan, site: Site) -> Record:
    """The record that has to be on disk before the first step of the plan is applied."""
    return record.changed(
        backend=plan.backend,
        steps=plan.steps,
        addresses=addresses_of(plan),
        cgroup=None if site.cgroup is None else str(site.cgroup),
        ports=plan.network.ports,
    )


def addresses_of(plan: Plan) -> tuple[str, ...]:
    """The pod's own addresses that others can reach, each once, in the order of the survey."""
    ips = (address.ip for address in plan.network.addresses)
    return tuple(dict.fromkeys(ip for ip in ips if "%" not in ip))


def apply_recorded(enrolled: Enrolled, steps: Iterable[Step], store: RecordStore) -> None:
    """Apply steps of the record in the order of their stages, noting each in the record.

    What a stage is going to replace is noted at once, before its first step. StepFailed leaves
    the steps before it in place: the record has them.
    """
    pod = enrolled.target
    with session(pod.netns):
        for _, stage in itertools.groupby(sorted(steps, key=_stage), key=_stage):
            intended = [observed(pod, step) for step in stage]
            _note(enrolled, intended, store)
            for step in intended:
                (applied,) = apply_stages(pod, (step,))
                if applied is not step:
                    _note(enrolled, (applied,), store)


def _stage(step: Step) -> Stage:
    return step.stage


def reserve(pod: Pod, plan: Plan) -> None:
    """Begin with what takes long of the steps that come last.

    Nothing of it is to be undone after a crash, so it is in no record.
    """
    for step in plan.steps:
        if isinstance(step, EgressGuard):
            with contextlib.suppress(PyambientError, OSError):
                step.reserve(pod)


def give_up_places(enrolled: Enrolled) -> None:
    """End what was reserved for an enrolment that failed; it takes as long as to reserve it."""
    while enrolled.places:
        enrolled.places.popitem()[1].close()


def observed(pod: Pod, step: Step) -> Step:
    """The step as it has to be on disk before it is applied."""
    if not _restores(type(step)):
        return step
    restoring: Restoring = step  # type: ignore[assignment]
    return restoring.observed(pod)


@functools.cache
def _restores(kind: type[Step]) -> bool:
    """To ask a protocol takes as long as to apply a small step."""
    return issubclass(kind, Restoring)


def _note(enrolled: Enrolled, these: Iterable[Step], store: RecordStore) -> None:
    """Put steps in the place of their equals in the record, as far as they know more."""
    recorded = {id(step) for step in enrolled.record.steps}
    more = {step: step for step in these if id(step) not in recorded}
    if more:
        steps = tuple(more.get(step, step) for step in enrolled.record.steps)
        write(enrolled, enrolled.record.changed(steps=steps), store)


@dataclass(frozen=True, slots=True)
class Repair:
    """Something that was not as the record says and now is; `kind` is what to count it under."""

    kind: str
    what: str
    why: str


class Round:
    """What was found out of the node already, while all pods are looked at.

    `in_place` are steps that other pods have as well.
    """

    def __init__(self) -> None:
        self.in_place: set[Step] = set()

    @functools.cached_property
    def node(self) -> bytes:
        """The node's fingerprint at the first time that it mattered."""
        return node_fingerprint()


def has_drifted(enrolled: Enrolled, round_: Round) -> bool:
    """Whether anything of the record may have got lost; cheap where nothing was touched."""
    pod, steps = enrolled.target, enrolled.record.steps
    if fingerprint(pod.netns, steps) != enrolled.seen:
        return True
    asked = [step for step in steps if not tells(step) and step not in round_.in_place]
    on_node = [step for step in asked if node_tells(step)]
    if on_node and round_.node == enrolled.seen_on_node:
        asked = [step for step in asked if step not in on_node]
    if lost(pod, asked):
        return True
    if on_node:
        enrolled.seen_on_node = round_.node
    round_.in_place.update(step for step in asked if is_of_node(step))
    return False


def bring_up_to_date(
    enrolled: Enrolled, interceptor: Interceptor, store: RecordStore
) -> list[Repair]:
    """Turn what is applied into what the pod needs now, and apply again what has got lost."""
    pod, record = enrolled.target, enrolled.record
    seen, enrolled.seen = fingerprint(pod.netns, record.steps), b""
    plan = interceptor.plan(pod, network_of(pod, record.ports), record.options)
    # What stays comes first: while steps are exchanged it must not be them that capture alone.
    repairs = _put_back(enrolled, [s for s in record.steps if s in plan.steps], store)
    if plan.steps != record.steps:
        _change(enrolled, plan, store)
        repairs.append(Repair("network", "addresses or devices", "they are others than before"))
        repairs += _put_back(enrolled, enrolled.record.steps, store)
    if addresses_of(plan) != record.addresses:
        write(enrolled, enrolled.record.changed(addresses=addresses_of(plan)), store)
    if not repairs:
        enrolled.seen = seen
    return repairs


def _put_back(enrolled: Enrolled, steps: Iterable[Step], store: RecordStore) -> list[Repair]:
    """Apply again what has got lost of these."""
    gone = lost(enrolled.target, steps)
    apply_recorded(enrolled, [step for step, _ in gone], store)
    return [Repair(step.kind, name_of(step), why) for step, why in gone]


def _change(enrolled: Enrolled, plan: Plan, store: RecordStore) -> None:
    """Turn the recorded steps into the plan's; the record holds both while that goes on."""
    pod, record = enrolled.target, enrolled.record
    added = [observed(pod, step) for step in plan.steps if step not in record.steps]
    both = {step: step for step in (*record.steps, *added)}
    write(enrolled, record.changed(steps=tuple(both)), store)
    known = dataclasses.replace(plan, steps=tuple(both[step] for step in plan.steps))
    try:
        steps = refresh(pod, record.steps, known)
    except StepFailed as failure:
        write(enrolled, record.changed(steps=failure.steps), store)
        raise
    write(enrolled, record.changed(steps=steps), store)


def free(record: Record, store: RecordStore) -> None:
    """Undo what a record says, with or without an agent, and remove it.

    Where the network namespace is gone, so is what was in it; what outlives it (pins, entries of
    maps) is keyed by the record, and is undone from an empty namespace, where the rest is
    nothing to undo.
    """
    with find(record.netns) or Netns.empty() as netns:
        undo_stages(Pod(record.pod.uid, netns), (*record.leaving, *record.steps))
    store.remove(record.pod.uid)


def write(enrolled: Enrolled, record: Record, store: RecordStore) -> None:
    """Make `record` the pod's, on disk first."""
    store.write(record)
    enrolled.record = record
