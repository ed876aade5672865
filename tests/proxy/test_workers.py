"""Workers as their parent has them: real processes that listen in the bed's pods."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from pyambient.errors import PyambientError
from pyambient.intercept.listeners import held_sockets, listening
from pyambient.model.numbers import DNS_PORT, INBOUND_PORT, RESERVED_PORTS
from pyambient.model.workload import PodRef
from pyambient.netns import Netns
from pyambient.proxy.settings import ProxySettings
from pyambient.proxy.workers import Workers, _joined
from pyambient.zds.details import DnsCapture, PodDetails
from tests.bed import Bed, BedPod, apps
from tests.bed.patience import patience

from .test_pods import is_open, send_nonsense, wait_closed

_TWO = 2


@asynccontextmanager
async def running(directory: Path, *, all_named: bool = True) -> AsyncIterator[Workers]:
    """Two of them, up; told that the agent has named all its pods, none, unless that is to come."""
    settings = ProxySettings(directory, directory / "ca", "cluster.local", workers=_TWO)
    workers = Workers(settings)
    async with trio.open_nursery() as nursery:
        await nursery.start(workers.run)
        if all_named:
            await workers.retain(frozenset())
        yield workers
        nursery.cancel_scope.cancel()


def play(
    directory: Path, scenario: Callable[[Workers], Awaitable[None]], *, all_named: bool = True
) -> None:
    async def main() -> None:
        async with running(directory, all_named=all_named) as workers:
            await scenario(workers)

    trio.run(main)


async def describe(workers: Workers, pod: BedPod, dns: DnsCapture | None) -> None:
    ips = (pod.ipv4 or "", pod.ipv6 or "")
    await workers.describe(pod.name, PodDetails("nftables", ips, dns=dns))


async def add(workers: Workers, pod: BedPod) -> None:
    ref = PodRef(pod.name, pod.name, "default", pod.name)
    await workers.add(ref, Netns.open(pod.name))


async def serve(workers: Workers, pod: BedPod) -> None:
    """What the agent would say of a pod."""
    await describe(workers, pod, DnsCapture())
    await add(workers, pod)


async def pids(workers: Workers, pod: BedPod) -> list[int]:
    rows = (await workers.status(pod.name)).get("workers", [])
    return [row["pid"] for row in rows if row["pid"]]


def listeners(pod: BedPod, *pids: int) -> list[int]:
    """The ports on which these processes listen in the pod, each as often as they do."""
    held = held_sockets(pids)
    return sorted(port for port, inode in listening(pod.netns) if inode in held)


async def both(workers: Workers, pod: BedPod, without: int) -> list[int]:
    """Wait until two workers serve the pod, and neither is `without`; their pids."""
    with trio.fail_after(patience(20)):
        while True:
            found = await pids(workers, pod)
            if len(found) == _TWO and without not in found:
                return found
            await trio.sleep(0.02)


def test_when_it_is_added_both_listen(bed: Bed, tmp_path: Path) -> None:
    """And neither does when it is removed."""
    pods = [bed.pod("a"), bed.pod("b")]

    async def scenario(workers: Workers) -> None:
        for pod in pods:
            await serve(workers, pod)
            for pid in await pids(workers, pod):
                assert listeners(pod, pid) == sorted(RESERVED_PORTS)
        found = await pids(workers, pods[0])
        assert len(found) == _TWO
        await workers.drain("a", 0)
        await workers.remove("a")
        assert listeners(pods[0], *found) == []
        assert listeners(pods[1], *found) == sorted(RESERVED_PORTS * _TWO)
        assert await workers.status("a") == {}

    play(tmp_path, scenario)


def test_a_pod_that_one_cannot_serve_is_served_by_none(bed: Bed, tmp_path: Path) -> None:
    """It is refused with the reason, and can be added when that is gone."""
    pod, other = bed.pod("a"), bed.pod("b")

    async def scenario(workers: Workers) -> None:
        await serve(workers, other)
        found = await pids(workers, other)
        with pod.spawn(apps.echo_server, INBOUND_PORT) as app:
            assert app.receive() == "listening"
            with pytest.raises(PyambientError, match=f"^port {INBOUND_PORT} is taken in the pod"):
                await serve(workers, pod)
            assert listeners(pod, *found) == []
        await serve(workers, pod)
        assert listeners(pod, *found) == sorted(RESERVED_PORTS * _TWO)
        assert await pids(workers, pod) == found

    play(tmp_path, scenario)


def test_what_is_tried_again_is_served_as_it_was_described(bed: Bed, tmp_path: Path) -> None:
    """Not as Istio's agent would have it, which describes nothing: its DNS is its own affair."""
    pod = bed.pod("a")

    async def scenario(workers: Workers) -> None:
        await describe(workers, pod, dns=None)
        with pod.spawn(apps.echo_server, INBOUND_PORT) as app:
            assert app.receive() == "listening"
            with pytest.raises(PyambientError, match=f"^port {INBOUND_PORT} is taken in the pod"):
                await add(workers, pod)
        await add(workers, pod)
        expected = sorted(port for port in RESERVED_PORTS * _TWO if port != DNS_PORT)
        assert listeners(pod, *await pids(workers, pod)) == expected

    play(tmp_path, scenario)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_ends_is_started_again(bed: Bed, tmp_path: Path, number: int) -> None:
    """It is told of every pod, and the other one is left alone."""
    pods = [bed.pod("a"), bed.pod("b")]

    async def scenario(workers: Workers) -> None:
        for pod in pods:
            await serve(workers, pod)
        victim, other = await pids(workers, pods[0])
        os.kill(victim, number)
        found = await both(workers, pods[1], victim)
        assert found[1] == other
        for pod in pods:
            assert listeners(pod, found[0]) == sorted(RESERVED_PORTS)

    play(tmp_path, scenario)


def test_one_that_hangs_is_replaced(bed: Bed, tmp_path: Path) -> None:
    """The pod that it does not take is served by the other one at once, and by both in the end."""
    pods = [bed.pod("a"), bed.pod("b")]

    async def scenario(workers: Workers) -> None:
        await serve(workers, pods[0])
        victim, other = await pids(workers, pods[0])
        os.kill(victim, signal.SIGSTOP)
        ref = PodRef("b", "b", "default", "b")
        await workers.add(ref, Netns.open("b"))
        assert listeners(pods[1], other) == sorted(RESERVED_PORTS)
        found = await both(workers, pods[1], victim)
        assert listeners(pods[1], *found) == sorted(RESERVED_PORTS * _TWO)

    play(tmp_path, scenario)


def test_an_agent_that_leaves_in_the_middle_costs_no_worker(bed: Bed, tmp_path: Path) -> None:
    """It cancels what it had asked for; both are told, and stay."""
    pods = [bed.pod("a"), bed.pod("b")]

    async def scenario(workers: Workers) -> None:
        await serve(workers, pods[0])
        found = await pids(workers, pods[0])
        with trio.CancelScope() as leaving:
            leaving.cancel()
            await workers.add(PodRef("b", "b", "default", "b"), Netns.open("b"))
        assert await pids(workers, pods[0]) == found
        await serve(workers, pods[1])
        assert listeners(pods[1], *found) == sorted(RESERVED_PORTS * _TWO)

    play(tmp_path, scenario)


def test_nothing_is_accepted_before_the_agent_has_named_all_its_pods(
    bed: Bed, tmp_path: Path
) -> None:
    """By no worker, one that has just been started again included."""
    pod = bed.pod("a")

    async def scenario(workers: Workers) -> None:
        await serve(workers, pod)
        for _ in range(_TWO):
            victim, _ = await pids(workers, pod)
            os.kill(victim, signal.SIGKILL)
            await both(workers, pod, victim)
        peers = [send_nonsense(pod) for _ in range(20)]
        await workers.status("a")  # each has had a turn
        await trio.sleep(0.2)
        assert all(map(is_open, peers))
        await workers.retain(frozenset({"a"}))
        for peer in peers:
            await wait_closed(peer)
            peer.close()

    play(tmp_path, scenario, all_named=False)


def test_what_several_say_of_a_pod_is_one_status() -> None:
    """Numbers are added up; a certificate is the one that expires first; absent is absent."""
    one: dict[str, Any] = {
        "identity": "a",
        "connections": 3,
        "draining": False,
        "certificate_expires": "2027",
    }
    other: dict[str, Any] = {
        "identity": "a",
        "connections": 4,
        "draining": True,
        "certificate_expires": "2026",
    }
    refused = (
        {"refused": {"x": 1}, "dns": None},
        {"refused": {"x": 2, "y": 1}, "dns": {"asked": 1}},
    )
    assert _joined(one | refused[0], other | refused[1]) == {
        "identity": "a",
        "connections": 7,
        "draining": True,
        "certificate_expires": "2026",
        "refused": {"x": 3, "y": 1},
        "dns": {"asked": 1},
    }
    assert _joined({}, one) == one
