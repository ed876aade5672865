"""Pods enrolled with backend `bpf` or `tc`, a null proxy serving them, and who talks to them."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pyambient.intercept import runner
from pyambient.intercept.choose import choose
from pyambient.intercept.guard_maps import Drops, read_drops
from pyambient.intercept.interface import Plan, Pod, Site, Stage, Step
from pyambient.intercept.kernel_objects import LinkInfo, link_infos
from pyambient.intercept.netns_cookie import netns_cookie
from pyambient.intercept.options import DEFAULTS, CaptureOptions
from pyambient.intercept.survey import survey
from pyambient.model.address import SocketAddress
from tests.bed import Bed, BedPod, Child, apps
from tests.bed.nullproxy import Interception, NullProxy

PORT = 8080
BPFFS = Path("/sys/fs/bpf/pyambient")
CAPTURE = (Stage.APPLY, Stage.STEER, Stage.GATE)


class BpfMesh:
    """Enrols pods as the agent does: programs, then listeners, then all that captures."""

    backend = "bpf"

    def __init__(self, bed: Bed, *pods: BedPod, options: CaptureOptions = DEFAULTS) -> None:
        self.bed = bed
        self.pods = pods
        self.site = Site(Path("/run/pyambient-unused"), BPFFS, bed.cgroup.path)
        self.recorded: dict[str, tuple[Step, ...]] = {}
        self.options = {pod.name: options for pod in pods}
        self.proxy: NullProxy | None = None

    def plan(self, pod: BedPod) -> Plan:
        options = self.options.get(pod.name, DEFAULTS)
        return choose(self.backend, self.site).plan(target(pod), survey(pod.netns), options)

    def prepare(self) -> None:
        for pod in self.pods:
            self._apply(pod, (Stage.PREPARE,))

    def listen(self) -> NullProxy:
        self.proxy = NullProxy.of(self.bed, self.pods, self.backend)
        return self.proxy

    def intercepted(self) -> list[Interception]:
        assert self.proxy is not None
        return self.proxy.accepted()

    def capture(self) -> None:
        for pod in self.pods:
            self._apply(pod, CAPTURE)

    def release_stages(self, pod: BedPod, stages: tuple[Stage, ...] = tuple(Stage)) -> None:
        recorded = self.recorded[pod.name]
        runner.undo_stages(target(pod), recorded, stages)
        self.recorded[pod.name] = tuple(s for s in recorded if s.stage not in stages)

    def refresh(self, pod: BedPod) -> None:
        """What the agent does when an address, a device or a choice of the pod has changed."""
        plan = self.plan(pod)
        self.recorded[pod.name] = runner.refresh(target(pod), self.recorded[pod.name], plan)

    def release(self) -> None:
        for pod in self.pods:
            if pod.name in self.recorded:
                self.release_stages(pod)

    def _apply(self, pod: BedPod, stages: tuple[Stage, ...]) -> None:
        steps = runner.apply_stages(target(pod), self.plan(pod).steps, stages)
        self.recorded[pod.name] = self.recorded.get(pod.name, ()) + steps

    def __enter__(self) -> Self:
        self.prepare()
        self.listen()
        self.capture()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        if self.proxy is not None:
            self.proxy.child.kill()


def target(pod: BedPod) -> Pod:
    """The pod as enrolment sees it; a uid with a dot, as bpffs does not like them."""
    return Pod(f"uid.of.{pod.name}", pod.netns)


def drops_of(pod: BedPod) -> Drops:
    """What the guards of an enrolled pod dropped; its plan has told the cookie already."""
    found = read_drops(BPFFS, netns_cookie(pod.netns, None))
    assert found is not None
    return found


def links_on(*places: BedPod | Path) -> set[LinkInfo]:
    """The links to these pods and cgroups; the machine may hold those of other sessions, too."""
    targets = {p.netns.inode if isinstance(p, BedPod) else p.stat().st_ino for p in places}
    return {info for info in link_infos() if info.target in targets}


def serve(pod: BedPod, port: int = PORT) -> Child:
    """An echo server in the pod."""
    echo = pod.spawn(apps.echo_server, port)
    assert echo.receive() == "listening"
    return echo


def at(pod: BedPod, family: str, port: int = PORT) -> SocketAddress:
    return SocketAddress(pod.address(family), port)
