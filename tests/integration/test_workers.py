"""`--workers 2`: connections of each pod are dealt out, and one worker's end is not the other's."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from pyambient.agent.client import ask
from pyambient.agent.config import RunDir
from pyambient.model.address import SocketAddress
from tests.bed import BedPod, Child, ClientOptions, Mesh, apps, capturing, is_gone

from .conftest import Pair, assert_all_tunnelled, between
from .test_capture import (  # noqa: F401 - these hold with one worker and with several
    test_a_half_close_stays_one,
    test_each_port_reaches_its_own_app,
    test_names_are_true,
    test_the_clients_reset_stays_one,
    test_the_servers_reset_stays_one,
)
from .test_dns import (  # noqa: F401 - likewise
    address,
    server,
    test_a_connection_carries_several_queries,
    test_apps_of_both_pods_get_the_answers_of_the_resolver_they_ask,
)
from .test_policy import POLICY

_MARKER = b"plaintext that must not be on the wire"
_TWO = ("--workers=2",)
# That one of two workers gets none of so many happens once in 10 ** 29 times.
_MANY = 100


@pytest.fixture(scope="module")
def mesh_settings() -> dict[str, Any]:
    """Two workers."""
    return {"options": _TWO}


def workers(mesh: Mesh, pod: BedPod) -> list[dict[str, Any]]:
    """What the agent knows of the workers that serve a pod; none if nobody does."""
    pods = ask(RunDir(mesh.run_dir), "status")["pods"]
    (found,) = (one for one in pods if one["name"] == pod.name)
    return list((found["proxy"] or {}).get("workers", ()))


def are_up(mesh: Mesh, *pods: BedPod) -> bool:
    """Whether both workers serve all of these pods."""
    rows = [workers(mesh, pod) for pod in pods]
    return all(len(two) == 2 and all(one["pid"] for one in two) for two in rows)


def both_workers(mesh: Mesh, pod: BedPod) -> list[dict[str, Any]]:
    """The workers that serve a pod, when both are up."""
    mesh.wait_until(lambda: are_up(mesh, pod), "both workers")
    return workers(mesh, pod)


def _shares(pair: Pair, pod: BedPod) -> list[int]:
    return [worker["connections"] for worker in workers(pair.mesh, pod)]


def test_each_worker_has_a_share(pair: Pair, echo: Child, destination: SocketAddress) -> None:
    """Of what the client's pod opens; the server's tunnels and plain connections as well."""
    with pair.client.spawn(apps.hold, destination, _MANY) as held:
        assert held.receive() == {}
        shares = _shares(pair, pair.client)
        assert sum(shares) == sum(_shares(pair, pair.server)) == _MANY
        assert min(shares) > _MANY / 10
    with pair.outside.spawn(apps.hold, destination, _MANY) as held:
        assert held.receive() == {}
        pair.mesh.wait_until(lambda: sum(_shares(pair, pair.client)) == 0, "end of the others")
        shares = _shares(pair, pair.server)
        assert sum(shares) == _MANY
        assert min(shares) > _MANY / 10


def test_what_each_carries_is_tunnelled(
    pair: Pair, echo: Child, destination: SocketAddress
) -> None:
    """By whichever worker at either end."""
    with capturing(pair.client) as capture:
        for _ in range(20):
            assert pair.client.run(apps.request, destination, _MARKER).data == _MARKER
    assert_all_tunnelled(capture, pair.client, pair.server, _MARKER)


def test_status_names_them(pair: Pair) -> None:
    """One line each, whatever the number of pods."""
    said = pair.mesh.cli("status").stdout
    for worker in workers(pair.mesh, pair.client):
        assert said.count(f"worker {worker['number']}: pid {worker['pid']}, connections: ") == 1
    assert said.count("worker ") == 2


def test_all_is_proven(pair: Pair) -> None:
    """`verify` knows that the workers' listeners are the proxy's."""
    for pod in (pair.client, pair.server):
        pair.mesh.cli("verify", pod.name)


def test_a_policy_reaches_both(pair: Pair, echo: Child, destination: SocketAddress) -> None:
    """What either has is ended when it would not be let in any more, and nothing comes in."""

    def loads() -> set[int]:
        lines = [one for one in pair.mesh.lines() if "was loaded again" in str(one.get("message"))]
        return {line["worker"] for line in lines[seen:]}

    seen = 0
    with pair.client.spawn(apps.hold, destination, _MANY) as held:
        assert held.receive() == {}
        seen = sum("was loaded again" in str(one.get("message")) for one in pair.mesh.lines())
        pair.mesh.write_mesh(POLICY.format(allowed="nobody"))
        pair.mesh.wait_until(lambda: loads() == {0, 1}, "reload by both")
        assert len(held.ask("ping")) == _MANY
        options = ClientOptions(timeout=8)
        refused = [pair.client.run(apps.request, destination, b"x", options) for _ in range(8)]
        assert [one.data for one in refused] == [b""] * 8
    seen = sum("was loaded again" in str(one.get("message")) for one in pair.mesh.lines())
    pair.mesh.write_mesh("# over\nworkloads: []\n")
    pair.mesh.wait_until(lambda: loads() == {0, 1}, "reload by both")


def test_a_killed_worker_takes_its_own_connections_alone(
    pair: Pair, echo: Child, destination: SocketAddress, family: str
) -> None:
    """Those of the other go on, new ones are served at once, nothing leaks, and it comes back."""
    beyond = SocketAddress(pair.outside.address(family), 8080)
    with pair.serve(pair.outside, 8080), pair.client.spawn(apps.hold, beyond, _MANY) as held:
        assert held.receive() == {}
        victim, other = both_workers(pair.mesh, pair.client)
        with capturing(pair.client) as capture:
            os.kill(victim["pid"], signal.SIGKILL)
            # What it had not accepted goes with its listeners, a moment after its connections.
            pair.mesh.wait_until(lambda: is_gone(victim["pid"]), "end of the worker")
            assert len(held.ask("ping")) == victim["connections"]
            for _ in range(10):
                assert pair.client.run(apps.request, destination, _MARKER).data == _MARKER
        pair.mesh.wait_until(lambda: are_up(pair.mesh, pair.client, pair.server), "new worker")
        assert len(held.ask("ping")) == victim["connections"]
    assert_all_tunnelled(capture, pair.client, pair.server, _MARKER)
    assert workers(pair.mesh, pair.client)[1]["pid"] == other["pid"]
    with pair.client.spawn(apps.hold, destination, _MANY) as held:
        assert held.receive() == {}
        assert min(_shares(pair, pair.client)) > _MANY / 10


def test_a_pod_enrolled_while_a_worker_is_down_gets_both(pair: Pair) -> None:
    """The one that lives serves it, the other is told when it is back."""
    late = pair.bed.pod("late")
    (first, _) = both_workers(pair.mesh, pair.client)
    os.kill(first["pid"], signal.SIGKILL)
    pair.mesh.enroll(late, backend=pair.backend)
    pair.mesh.wait_until(lambda: are_up(pair.mesh, late), "both workers in the pod")
    pair.mesh.cli("verify", late.name)
    pair.mesh.unenroll(late)


def test_a_killed_parent_is_closed_and_comes_back(
    pair: Pair, echo: Child, destination: SocketAddress
) -> None:
    """Its workers end with it: nothing goes out past the mesh, and then all is served again."""
    before = {worker["pid"] for worker in both_workers(pair.mesh, pair.client)}
    (parent,) = pair.mesh.status()["proxies"]
    with capturing(pair.client) as capture:
        os.kill(parent, signal.SIGKILL)
        pair.mesh.wait_until(lambda: all(map(is_gone, before)), "end of the workers")
        pair.client.run(apps.request, destination, _MARKER, ClientOptions(timeout=1))
        pair.mesh.wait_until(
            lambda: pair.client.run(apps.request, destination, _MARKER).data == _MARKER, "answer"
        )
    assert [str(one) for one in capture.packets if _MARKER in one.payload] == []
    assert [str(one) for one in between(capture.packets, pair.client, pair.server)
            if destination.port in one.ports] == []  # fmt: skip
    pair.mesh.wait_until(lambda: are_up(pair.mesh, pair.client, pair.server), "both workers")
    assert before.isdisjoint(worker["pid"] for worker in workers(pair.mesh, pair.client))
