"""What an interception backend is: a pure plan of steps, and one runner for all of them.

General theory of operation
---------------------------
A backend decides *what* has to be in a pod's network namespace (`Interceptor.plan`, a pure
function of what was found there) and nothing else. A plan is a tuple of steps; a step is a frozen
value that knows how to describe, apply, verify and undo itself, and that can be written to disk
and read back. All else follows from that, once for every backend:

* `--dry-run` prints the steps, golden files compare them;
* enrolment applies them in stages, and undoes what it did when one fails;
* the record on disk is the steps that were applied, so un-enrolment works without the agent and
  deletes only what was added;
* a changed address or device is the difference between two plans;
* reconciling is verifying each recorded step and applying again what is missing.

Stages, in order: PREPARE (before the proxy's listeners exist: node-wide programs, reserved
ports), APPLY (routes, rules, sysctls, addresses), STEER (inbound traffic reaches the proxy), GATE
(outbound traffic does; always last). Un-enrolment closes GATE and STEER first, lets the proxy
drain while the rest keeps its live connections working, and then undoes the rest in reverse.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from pyambient.errors import PyambientError
from pyambient.model.ports import WELL_KNOWN, Ports
from pyambient.netns import Netns

from .kernel_objects import Link
from .options import DEFAULTS, CaptureOptions


class Stage(enum.IntEnum):
    """When a step is applied; undone in the opposite order."""

    PREPARE = 0
    APPLY = 1
    STEER = 2
    GATE = 3


@dataclass(frozen=True, slots=True)
class Site:
    """Where on this node our state lives.

    `cgroup` is the one of all apps, `probe_cgroup` that of what probes their health from the node
    (None: the same).
    """

    run_dir: Path
    bpffs: Path
    cgroup: Path | None
    probe_cgroup: Path | None = None

    @property
    def proxy_cgroup(self) -> Path | None:
        """The proxy's own cgroup, by which the BPF programs know its sockets."""
        return None if self.cgroup is None else self.cgroup / "pyambient-proxy"


@dataclass(frozen=True, slots=True)
class PodAddress:
    """An address found in a pod's network namespace, in canonical text."""

    ip: str
    device: str


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """What of a pod's network namespace decides its plan.

    `devices` are all that are up but lo, `ipv4_only` those of them with IPv6 turned off.
    `tentative` are addresses that duplicate address detection still holds back (RFC 4862
    section 5.4): no route can name them as its source yet. `ports` are those that the proxy has.
    """

    addresses: tuple[PodAddress, ...]
    devices: tuple[str, ...]
    has_ipv6: bool
    ipv4_only: tuple[str, ...] = ()
    tentative: tuple[PodAddress, ...] = ()
    ports: Ports = WELL_KNOWN

    def primary(self, *, ipv6: bool, device: str | None = None) -> str | None:
        """The address captured connections get as their source: the first one of a real scope.

        Those of a socket bound to `device` get the first one there, if it has one: the answers
        to another device's address would never reach such a socket.
        """
        usable = [
            address
            for address in self.addresses
            if (":" in address.ip) is ipv6 and address.device != "lo" and "%" not in address.ip
        ]
        usable.sort(key=lambda address: address.device != device)
        return usable[0].ip if usable else None


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod's open network namespace and the uid its state is kept under.

    `places` are those on its devices that are reserved (`device_program`), by name.
    """

    uid: str
    netns: Netns
    places: dict[str, Link] = field(default_factory=dict, compare=False, repr=False)


class Step(Protocol):
    """One thing an enrolment adds. Implementations are frozen dataclasses of JSON values.

    `apply` is idempotent and leaves nothing behind when it raises. It returns the step to be
    recorded: itself, or itself with what `undo` needs (a sysctl's previous value); applied once
    more, a recorded step keeps that. Two steps are the same step if they are equal, so the fields
    for `undo` are declared with `field(compare=False)`.
    """

    kind: ClassVar[str]
    stage: ClassVar[Stage]

    def describe(self) -> str:
        """What it is for people, as the command that would do it; the first line names it."""

    def apply(self, pod: Pod) -> Step: ...

    def undo(self, pod: Pod) -> None:
        """Take away what `apply` added; what is gone already is no error."""

    def missing(self, pod: Pod) -> str | None:
        """What of this step is not there any more, or None."""


@runtime_checkable
class Restoring(Protocol):
    """A step that replaces a value of somebody else's, and has to bring it back."""

    def observed(self, pod: Pod) -> Step:
        """The step with what `undo` needs, before anything is changed: to be recorded first."""


@runtime_checkable
class Replacing(Protocol):
    """A step that can be applied over an earlier one, so that there is no moment without.

    When its `apply` raises, the earlier one is still in place.
    """

    def takes_over(self, earlier: Step) -> bool:
        """Whether `earlier`, which is in place, is ended by applying this one."""


def is_of_node(step: Step) -> bool:
    """Whether the step is the same one for every pod that has it: its class says `of_node`."""
    return bool(getattr(step, "of_node", False))


_kinds: dict[str, type[Any]] = {}


def step(cls: type[Any]) -> type[Any]:
    """Register a step class under its `kind`, so that records can name it."""
    _kinds[cls.kind] = cls
    return cls


def to_record(steps: Iterable[Step]) -> list[dict[str, Any]]:
    """Steps as JSON values.

    Their fields hold nothing to be converted, and a record is written a dozen times an enrolment:
    `dataclasses.asdict`, which copies deeply, would take longer than all that is recorded.
    """
    return [{"kind": s.kind, **values_of(s)} for s in steps]


def values_of(one: Any) -> dict[str, Any]:
    """The fields of a dataclass, as they are."""
    return {name: getattr(one, name) for name in _fields(one.__class__)}


@functools.cache
def _fields(kind: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def from_record(items: Iterable[Mapping[str, Any]]) -> tuple[Step, ...]:
    """The steps of a record; PyambientError if it names a kind that this version lacks."""
    steps = []
    for item in items:
        fields = dict(item)
        kind = fields.pop("kind")
        if kind not in _kinds:
            raise PyambientError(f"the record names an unknown step {kind!r}", "upgrade pyambient")
        lists = {name: tuple(v) for name, v in fields.items() if isinstance(v, list)}
        steps.append(_kinds[kind](**{**fields, **lists}))
    return tuple(steps)


@dataclass(frozen=True, slots=True)
class Plan:
    """What `backend` adds to one pod, in the order of application."""

    backend: str
    network: PodNetwork
    steps: tuple[Step, ...]

    def render(self) -> str:
        """The plan for people and golden files, a stage per paragraph."""
        lines = []
        for stage in Stage:
            chosen = [s.describe() for s in self.steps if s.stage is stage]
            if chosen:
                lines.append(f"# {stage.name.lower()}")
                lines += chosen
        return "\n".join(lines) + "\n"


class Interceptor(Protocol):
    """A backend: it plans; the runner in `intercept.runner` does the rest."""

    name: ClassVar[str]

    def plan(self, pod: Pod, network: PodNetwork, options: CaptureOptions = DEFAULTS) -> Plan:
        """What this pod needs; no side effects."""
