"""Pods enrolled with a netfilter backend, in the agent's order, and a null proxy for them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Self

from pyambient.intercept.interface import Interceptor, Plan, Pod, Stage, Step
from pyambient.intercept.iptables import Iptables
from pyambient.intercept.nftables import Nftables
from pyambient.intercept.options import DEFAULTS, CaptureOptions
from pyambient.intercept.runner import apply_stages, refresh, undo_stages
from pyambient.intercept.survey import survey
from tests.bed import Bed, BedPod, Interception, NullProxy

STEERING = (Stage.STEER, Stage.GATE)
FOUNDATION = (Stage.PREPARE, Stage.APPLY)


# The backends, and of iptables each variant.
INTERCEPTORS: dict[str, Interceptor] = {
    "nftables": Nftables(),
    "iptables-nft": Iptables("nft"),
    "iptables-legacy": Iptables("legacy"),
}


def target(pod: BedPod) -> Pod:
    """The pod of the bed as the backends see it."""
    return Pod(f"uid-{pod.name}", pod.netns)


class NetfilterMesh:
    """Enrolled while the block runs; what is in each pod is in `recorded`."""

    def __init__(self, bed: Bed, *pods: BedPod, interceptor: Interceptor) -> None:
        self.bed = bed
        self.pods = pods
        self.interceptor = interceptor
        self.recorded: dict[str, tuple[Step, ...]] = {}
        self.options: dict[str, CaptureOptions] = {}

    def plan(self, pod: BedPod) -> Plan:
        options = self.options.get(pod.name, DEFAULTS)
        return self.interceptor.plan(target(pod), survey(pod.netns), options)

    def enrol(self, pod: BedPod) -> None:
        self.recorded[pod.name] = apply_stages(target(pod), self.plan(pod).steps)

    def refresh(self, pod: BedPod) -> None:
        """What the agent does when an address, a device or a choice of the pod has changed."""
        recorded = self.recorded[pod.name]
        self.recorded[pod.name] = refresh(target(pod), recorded, self.plan(pod))

    def close(self, pod: BedPod, stages: Collection[Stage]) -> None:
        """Undo these stages of the pod's enrolment."""
        recorded = self.recorded[pod.name]
        undo_stages(target(pod), recorded, stages)
        self.recorded[pod.name] = tuple(step for step in recorded if step.stage not in stages)

    def intercepted(self) -> list[Interception]:
        return self.proxy.accepted()

    def __enter__(self) -> Self:
        self.proxy = NullProxy.of(self.bed, self.pods, "nftables")
        for pod in self.pods:
            self.enrol(pod)
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self.pods:
            self.close(pod, STEERING)
        self.proxy.child.kill()
        for pod in self.pods:
            self.close(pod, FOUNDATION)
