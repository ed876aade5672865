"""A pod as the agent holds it, and the request it came with."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

import trio

from pyambient.errors import UsageError
from pyambient.intercept.interface import Pod
from pyambient.intercept.kernel_objects import Link
from pyambient.intercept.options import CaptureOptions
from pyambient.model.spiffe import SpiffeId
from pyambient.model.workload import PodRef
from pyambient.netns import Netns
from pyambient.zds.details import PodDetails

from .described import details_of
from .leaks import Leaks
from .locate import path_of
from .records import NetnsRef, Record, State

# Kubernetes' own limit; three names and a uid of that length still fit a ZDS packet.
_LONGEST_NAME: Final = 253


@dataclass(frozen=True, slots=True)
class EnrolRequest:
    """What to enrol: `netns` as `Netns.open` takes it, `backend` as `choose` does.

    `existing` is what becomes of connections from before: "keep", which is what "" means, or
    "close".

    What is "" holds as it was where the namespace is enrolled already, as do choices that are not
    named. Else the backend is "auto" and the name the namespace's own.
    """

    netns: str
    name: str = ""
    namespace: str = ""
    service_account: str = ""
    backend: str = ""
    existing: str = ""
    choices: Mapping[str, Any] = field(default_factory=dict)

    def refuse_other(self, record: Record) -> None:
        """UsageError if another pod is meant than the one that is enrolled."""
        pod, label = record.pod, record.netns.label
        known = (pod.name, pod.namespace, pod.service_account)
        given = (self.name, self.namespace, self.service_account)
        if any(text and text != known[n] for n, text in enumerate(given)):
            raise UsageError(
                f"{label} is {record.state.value} already, as {pod}"
                f" (service account {pod.service_account})",
                f"run 'pyambient unenroll {label}' first",
            )

    def pod(self) -> PodRef:
        """The pod, under a uid of its own; UsageError for names that no identity can have."""
        if not self.namespace or not self.service_account:
            raise UsageError(
                f"{self.netns} is not enrolled", "give it --namespace and --service-account"
            )
        name = self.name or name_of(self.netns)
        named = {
            "name": name,
            "namespace": self.namespace,
            "service account": self.service_account,
        }
        for what, text in named.items():
            if len(text) > _LONGEST_NAME or not _fits_identity(text):
                raise UsageError(
                    f"{text!r} cannot be a {what}",
                    f"use letters, digits, '.', '_' and '-', at most {_LONGEST_NAME} of them",
                )
        return PodRef(str(uuid.uuid4()), name, self.namespace, self.service_account)


def name_of(netns: str) -> str:
    """What a pod is called if nobody says: as its namespace; UsageError if that has no name."""
    path = path_of(netns)
    if path.startswith("/proc/"):
        raise UsageError(f"{netns} has no name to be known by", "give it one with --name")
    return path.rpartition("/")[2]


def _fits_identity(text: str) -> bool:
    try:
        SpiffeId.parse(f"spiffe://any/ns/{text}/sa/{text}")
    except ValueError:
        return False
    return True


@dataclass(eq=False, slots=True)
class Enrolled:
    """A pod, its record as it is on disk, and its open network namespace.

    `freed` is set when the agent no longer holds the pod; `turn` keeps enrolling, refreshing and
    freeing of this one pod apart. `switched` is set when its backend was exchanged. `seen` is the
    fingerprint with which all its steps were last found in place, `seen_on_node` the node's with
    which those there were; `repairs` counts by kind what was not. `leaks` is what is known of its
    guards. `places` is what was reserved for its enrolment.
    """

    record: Record
    netns: Netns
    turn: trio.Lock = field(default_factory=trio.Lock)
    freed: trio.Event = field(default_factory=trio.Event)
    switched: trio.Event = field(default_factory=trio.Event)
    seen: bytes = b""
    seen_on_node: bytes = b""
    repairs: Counter[str] = field(default_factory=Counter)
    leaks: Leaks = field(default_factory=Leaks)
    places: dict[str, Link] = field(default_factory=dict)

    @classmethod
    def opened(cls, request: EnrolRequest) -> Self:
        """A pod whose enrolment begins; nothing is written or changed yet."""
        pod = request.pod()
        netns = Netns.open(request.netns)
        try:
            ref = NetnsRef.of(netns, path_of(request.netns))
        except BaseException:
            netns.close()
            raise
        netns.name = ref.label
        options = CaptureOptions.from_json(request.choices)
        backend = request.backend or "auto"
        record = Record(pod, ref, backend, State.ENROLLING, (), options=options)
        return cls(record, netns)

    @property
    def uid(self) -> str:
        return self.record.pod.uid

    @property
    def target(self) -> Pod:
        """The pod as interception sees it."""
        return Pod(self.uid, self.netns, self.places)

    @property
    def details(self) -> PodDetails:
        return details_of(self.record)

    def __repr__(self) -> str:
        return f"<Enrolled {self.record.pod} {self.record.state.value} in {self.netns!r}>"
