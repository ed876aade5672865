"""What a proxy has to know of ports that are taken in a pod, and one that cannot."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NoReturn

import pytest

from pyambient.agent import interception
from pyambient.errors import PyambientError
from pyambient.model.ports import WELL_KNOWN
from tests.bed import BedPod, Channel, Child, apps, changes, kernel_state

from .rig import Rig
from .test_enrolment import problems


def _serve(pod: BedPod, port: int) -> Child:
    server = pod.spawn(apps.echo_server, port)
    assert server.receive() == "listening"
    return server


def _comm(child: Child) -> str:
    return f"{child.pid} ({Path(f'/proc/{child.pid}/comm').read_text().strip()})"


@pytest.fixture
def pods(rig: Rig) -> tuple[BedPod, BedPod]:
    return rig.bed.pod("one"), rig.bed.pod("two")


def test_a_foreign_proxy_is_refused(rig: Rig, pods: tuple[BedPod, BedPod], backend: str) -> None:
    """It knows of no other ports: one line says who has one; the other pod is served by it."""
    one, two = pods
    rig.start_agent()
    proxy = rig.start_proxy(foreign=True)
    rig.wait_for_proxies()
    before = kernel_state(one, two)
    with _serve(one, 15008) as server:
        with pytest.raises(PyambientError) as refused:
            rig.enroll(one, backend)
        assert refused.value.what == (
            f"port 15008 of {one.name} is taken by {_comm(server)}, and the proxy"
            f" (pid {proxy.pid}) can listen on no other"
        )
        assert "pyambient proxy" in refused.value.then
    assert changes(before, kernel_state(one, two)) == []
    assert rig.records() == {}
    rig.enroll(two, "nftables")


def test_it_takes_what_it_needs_alone(rig: Rig, pods: tuple[BedPod, BedPod]) -> None:
    """The port for DNS is no matter where DNS is not captured."""
    one, _ = pods
    rig.start_agent()
    rig.start_proxy()
    rig.wait_for_proxies()
    with _serve(one, 15053):
        names = {"name": "one", "namespace": "default", "service_account": "one"}
        options = {"dns": False}
        rig.ask("enroll", netns=one.path, backend="nftables", options=options, **names)
    assert rig.records()["one"].ports.moved == {15053: 15153}


def test_a_foreign_proxy_in_the_place_of_ours(rig: Rig, pods: tuple[BedPod, BedPod]) -> None:
    """The pods that it can serve it serves; of the other one the log says why not."""
    rig.start_agent()
    proxy = rig.start_proxy()
    rig.wait_for_proxies()
    with _serve(pods[0], 15001) as server:
        for pod in pods:
            rig.enroll(pod, "bpf")
            assert problems(rig, pod) == []
        proxy.kill()
        foreign = rig.start_proxy(foreign=True)
        rig.wait_for_proxies()
        rig.wait_until(lambda: rig.logged("a pod is not served"))
        (line,) = rig.logged("a pod is not served")
        assert f"taken by {_comm(server)}" in line["error"]
        assert f"pid {foreign.pid}" in line["error"]
        assert foreign.ask("calls")[0] == "add two"


def test_ports_outlive_the_agent(rig: Rig, pods: tuple[BedPod, BedPod], backend: str) -> None:
    """Its successor reads them from the record, frees the pod, and so does nobody at all."""
    one, two = pods
    agent = rig.start_agent()
    rig.start_proxy()
    rig.wait_for_proxies()
    before = kernel_state(one, two)
    servers = [_serve(pod, port) for pod in pods for port in WELL_KNOWN]
    for pod in pods:
        rig.enroll(pod, backend)
    moved = (15101, 15106, 15108, 15153)
    assert [record.ports for record in rig.records().values()] == [moved, moved]
    agent.kill()
    rig.start_agent()
    rig.wait_for_proxies()
    for pod in pods:
        assert problems(rig, pod) == []
        rig.ask("unenroll", netns=pod.path, drain_timeout=0)
    for server in servers:
        server.kill()
    assert changes(before, kernel_state(one, two)) == []


def test_a_switch_keeps_them(rig: Rig, pods: tuple[BedPod, BedPod]) -> None:
    """The proxy goes on listening where it does; each backend learns where that is."""
    one, _ = pods
    rig.start_agent()
    rig.start_proxy()
    rig.wait_for_proxies()
    with _serve(one, 15001), _serve(one, 15008):
        for backend in ("bpf", "nftables", "tc", "iptables", "bpf"):
            rig.enroll(one, backend)
            assert problems(rig, one) == []
            assert rig.records()["one"].ports.moved == {15001: 15101, 15008: 15108}
            rig.wait_until(lambda: not rig.records()["one"].leaving)


class _FailOneChange:
    """Has the first change of a pod's steps fail before it begins."""

    def __init__(self) -> None:
        self._is_set = False

    def __call__(self) -> None:
        if not self._is_set:
            self._is_set = True
            self._refresh, interception.refresh = interception.refresh, self._fail

    def _fail(self, *_: object) -> NoReturn:
        interception.refresh = self._refresh
        raise PyambientError("told to fail")


def test_a_relocation_that_fails_half_way_is_tried_again(
    rig: Rig, pods: tuple[BedPod, BedPod]
) -> None:
    """The ports were chosen and in the record already; the proxy hears of them all the same."""
    rig.start_agent(sabotage=_FailOneChange())
    proxy = rig.start_proxy()
    rig.wait_for_proxies()
    for pod in pods:
        rig.enroll(pod, "nftables")
    proxy.kill()
    with _serve(pods[0], 15001):
        rig.start_proxy()
        rig.wait_until(
            lambda: [pod["proxy"] for pod in rig.ask("status")["pods"]] == [{"listeners": 3}] * 2
        )
        (line,) = rig.logged("a pod is not served")
        assert line["error"] == "told to fail"
        rig.wait_until(lambda: rig.logged("a port is taken"))
        assert rig.records()["one"].ports.moved == {15001: 15101}
        for pod in pods:
            assert problems(rig, pod) == []


_PR_SET_NAME = 15


def _serve_as(channel: Channel, name: bytes, port: int) -> int:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name)
    return apps.echo_server(channel, port)


def test_an_app_whose_name_is_no_text(rig: Rig, pods: tuple[BedPod, BedPod], backend: str) -> None:
    """Any bytes but zero, set by the app: its pod is enrolled, and the name is one line's part."""
    rig.start_agent()
    rig.start_proxy()
    rig.wait_for_proxies()
    with pods[0].spawn(_serve_as, b"\xff\n\x1b[2J", 15001) as server:
        assert server.receive() == "listening"
        for pod in pods:
            rig.enroll(pod, backend)
            assert problems(rig, pod) == []
        (line,) = rig.logged("a port is taken")
        assert line["by"] == f"{server.pid} (\ufffd??[2J)"
