"""Peers with a certificate of the mesh and bad intentions, against a running proxy.

Whatever a peer does to it, as a client at port 15008 or as the server that an app's connection is
tunnelled to: the proxy's memory stays bounded, and the connections of others go on. A `witness` in
another pod makes such connections all the while, through the same proxy to the same pod.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import HBONE_PORT
from pyambient.proxy.budgets import PEER_BUFFERED
from tests.bed import BedPod, Channel, Child, ClientOptions, apps
from tests.bed.memory import bounded_growth

from . import attacker, hostile, stubborn
from .conftest import Pair
from .hostile import FLOODS
from .test_policy import load

pytestmark = pytest.mark.parametrize("backend", ["bpf"], scope="module")

FRIEND = "spiffe://cluster.local/ns/default/sa/friend"
OUTSIDE = "spiffe://cluster.local/ns/default/sa/outside"
APP_PORT = 8097
MIB = 1 << 20
# Of one connection: an output buffer, BIOs, and what CPython keeps of what it has freed.
FLOOD_MEMORY = 8 * MIB
PATIENT = ClientOptions(timeout=60)
_WORKLOAD = """
- uid: {name}
  name: {name}
  namespace: default
  serviceAccount: outside
  workloadIps: ["{ip}"]
  protocol: HBONE
  services: {{}}
"""
BY_CLIENT = [name for name, flood in FLOODS.items() if "client" in flood.roles]
BY_SERVER = [name for name, flood in FLOODS.items() if "server" in flood.roles]
# Where a server stalls, and the address of it.
STALLS = {"tls": "10.77.0.101", "settings": "fd77::102", "answer": "10.77.0.103"}


def witness(channel: Channel, destination: SocketAddress, payload: bytes) -> None:
    """Connections with an answer each, until asked how they went: the failures and how many."""
    failures, count = [], 0
    channel.send("going on")
    while True:
        seen = apps.request(destination, payload, PATIENT)
        count += 1
        if seen.failed or seen.data != payload:
            failures.append((seen.errno, seen.stage, len(seen.data)))
        if channel.poll():
            channel.receive()
            channel.send((failures, count))


@pytest.fixture(scope="module")
def app(pair: Pair) -> Iterator[Child]:
    """The server's app, for friend and foe; it has served large answers before."""
    with pair.serve(pair.server, APP_PORT) as server:
        for pod in (pair.client, pair.server):
            to = SocketAddress(pair.server.address("v4"), APP_PORT)
            assert len(pod.run(apps.request, to, bytes(3 * MIB), PATIENT).data) == 3 * MIB
        yield server


@pytest.fixture(scope="module")
def hostile_servers(pair: Pair) -> None:
    """The mesh takes addresses of the pod outside for workloads that speak HBONE."""
    for ip in STALLS.values():
        length = 64 if ":" in ip else 24
        pair.outside.ip(f"addr add {ip}/{length} dev eth0" + (" nodad" if ":" in ip else ""))
    addresses = (pair.outside.address("v4"), pair.outside.address("v6"), *STALLS.values())
    lines = [_WORKLOAD.format(name=f"outside-{n}", ip=ip) for n, ip in enumerate(addresses)]
    load(pair, "workloads:" + "".join(lines))


@pytest.fixture(scope="module")
def stranger(pair: Pair) -> BedPod:
    """Another pod that is not enrolled."""
    return pair.bed.pod("stranger")


@pytest.fixture
def hbone(pair: Pair, family: str) -> SocketAddress:
    return SocketAddress(pair.server.address(family), HBONE_PORT)


@pytest.fixture
def target(pair: Pair, family: str) -> SocketAddress:
    """Where the app listens, and whom the witness asks."""
    return SocketAddress(pair.server.address(family), APP_PORT)


@pytest.fixture
def friend(pair: Pair) -> attacker.Credentials:
    return attacker.issue(pair.mesh.ca_dir, FRIEND)


@pytest.fixture
def impostor(pair: Pair) -> attacker.Credentials:
    """What the hostile server proves itself with: it is whom the mesh expects there."""
    return attacker.issue(pair.mesh.ca_dir, OUTSIDE)


@pytest.fixture
def others_go_on(
    pair: Pair, target: SocketAddress
) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """Fails where a block's end finds a failure, or too few connections that went well in it."""

    @contextlib.contextmanager
    def going_on(memory: int, at_least: int = 0) -> Iterator[None]:
        pids = [int(pid) for pid in (pair.bed.cgroup.proxy / "cgroup.procs").read_text().split()]
        assert pids
        with (
            pair.client.spawn(witness, target, os.urandom(50_000)) as child,
            bounded_growth(pids, memory),
        ):
            assert child.receive() == "going on"
            yield
            failures, count = child.ask("how did it go?", 60)
            while not failures and count < at_least:
                failures, count = child.ask("and now?", 60)
            assert failures == []

    return going_on


@pytest.mark.parametrize("name", BY_CLIENT)
def test_a_client_that_floods(pair, app, hbone, target, friend, others_go_on, name):
    """It is told why and loses its connection, or no more than the stream it broke."""
    flood = FLOODS[name]
    with others_go_on(FLOOD_MEMORY):
        outcome = pair.outside.run(hostile.flood, hbone, friend, str(target), name, timeout=60)
    assert (outcome.goaway, outcome.alive) == (flood.code, flood.code is None)
    if flood.code is None:
        assert [stream_id for stream_id, _ in outcome.resets] == [1]


@pytest.mark.parametrize("name", BY_SERVER)
def test_a_server_that_floods(pair, app, hostile_servers, impostor, family, others_go_on, name):
    """As a client that does; the app behind the proxy sees its connection reset."""
    flood, host = FLOODS[name], pair.outside.address(family)
    with (
        pair.outside.spawn(hostile.flooding_server, host, impostor, name) as server,
        others_go_on(FLOOD_MEMORY),
    ):
        assert server.receive() == "listening"
        with pair.client.spawn(apps.hold, SocketAddress(host, 80), 1) as victim:
            outcome = server.receive(60)
            assert victim.receive() == {0: errno.ECONNRESET}
    assert (outcome.goaway, outcome.alive) == (flood.code, flood.code is None)


def test_clients_that_never_read(pair, app, hbone, target, friend, others_go_on):
    """Each asks for megabytes, on several streams, and leaves them to the proxy."""
    with others_go_on(32 * MIB, at_least=20):
        deaf = (stubborn.deaf_clients, hbone, friend, str(target), 8)
        with pair.outside.spawn(*deaf) as child:
            assert child.receive(30) == "deaf"


def test_a_crowd_of_tunnels_that_never_read(
    pair, app, stranger, hbone, target, friend, others_go_on
):
    """What is kept for one peer is bounded, however many tunnels it has; the rest are cut off.

    Another peer's tunnel lives meanwhile, and afterwards there is room again.
    """
    headers = attacker.connect_headers(str(target))
    deaf = (stubborn.deaf_crowd, hbone, friend, str(target), 180)
    before = _refusals(pair)
    with others_go_on(100 * MIB, at_least=20), pair.outside.spawn(*deaf) as child:
        assert child.receive(90) == "deaf"
        pair.mesh.wait_until(lambda: child.ask("cut off") > 0, "a tunnel that is cut off")
        assert child.ask("cut off") < 150
        assert _refusals(pair) > before
        assert stranger.run(attacker.attack, hbone, friend, headers).statuses == [200]
    wanted = {"message": "budget used up, refusing", "budget": PEER_BUFFERED}
    assert any(wanted.items() <= line.items() for line in pair.mesh.lines())
    assert pair.outside.run(attacker.attack, hbone, friend, headers).statuses == [200]


def _refusals(pair):
    """How often more was to be kept for a peer of the server's than may be."""
    (pod,) = (pod for pod in pair.mesh.status()["pods"] if pod["name"] == "server")
    return pod["proxy"]["refused"].get(PEER_BUFFERED, 0)


def test_a_server_that_never_reads(pair, app, hostile_servers, impostor, family, others_go_on):
    """The app behind the proxy can send no more at some point; that costs nobody else anything."""
    host = pair.outside.address(family)
    with (
        pair.outside.spawn(stubborn.deaf_server, host, impostor) as server,
        others_go_on(8 * MIB, at_least=20),
    ):
        assert server.receive() == "listening"
        with pair.client.spawn(stubborn.firehose, SocketAddress(host, 80)) as victim:
            assert server.receive() == "deaf"
            assert victim.receive() == "stuck"


def test_an_app_that_never_reads(pair, hbone, family, app, friend, others_go_on):
    """Peers send it all that their windows allow: the pod's budget is used up, and no more."""
    authority = str(SocketAddress(pair.server.address(family), APP_PORT + 1))
    with (
        pair.server.spawn(stubborn.deaf_app, APP_PORT + 1) as deaf,
        others_go_on(160 * MIB, at_least=20),
    ):
        assert deaf.receive() == "listening"
        with pair.outside.spawn(stubborn.deaf_clients, hbone, friend, authority, 12) as child:
            assert child.receive(30) == "deaf"


def test_a_client_with_windows_of_one(pair, app, hbone, target, friend, others_go_on):
    payload = os.urandom(500)
    with others_go_on(4 * MIB):
        outcome = pair.outside.run(stubborn.tiny_windows, hbone, friend, str(target), payload)
    assert outcome.data == payload


def test_a_server_with_windows_of_one(pair, app, hostile_servers, impostor, family, others_go_on):
    payload, host = os.urandom(500), pair.outside.address(family)
    serving = (stubborn.tiny_window_server, host, impostor, len(payload))
    with pair.outside.spawn(*serving) as server, others_go_on(4 * MIB):
        assert server.receive() == "listening"
        with pair.client.spawn(stubborn.send_and_wait, SocketAddress(host, 80), payload):
            assert server.receive().data == payload


def test_peers_that_drip(pair, app, hbone, target, friend, others_go_on):
    """A byte a second: no handshake may take so long, data may, and neither holds up others."""
    hello, payload = stubborn.client_hello(friend), b"in time"
    with (
        others_go_on(8 * MIB, at_least=20),
        pair.outside.spawn(stubborn.drip_hello, hbone, hello) as in_tls,
        pair.outside.spawn(stubborn.drip_preface, hbone, friend) as in_http2,
        pair.outside.spawn(stubborn.drip_data, hbone, friend, str(target), payload) as in_data,
    ):
        for child in (in_tls, in_http2, in_data):
            assert child.receive() == "dripping"
        in_tls.wait(20)
        assert in_http2.receive(20)
        assert in_data.receive(20).data == payload
    wanted = {"direction": "inbound", "dst.addr": str(hbone)}
    pair.mesh.access_log(wanted | {"error": "no TLS handshake in 10 s"})


def test_servers_that_stall(pair, app, hostile_servers, impostor, target, others_go_on):
    """Before TLS, before SETTINGS, before the answer: the app is told in time."""
    with others_go_on(8 * MIB, at_least=20), contextlib.ExitStack() as stack:
        waiting = []
        for at, ip in STALLS.items():
            serving = (stubborn.stalling_server, ip, impostor, at)
            assert stack.enter_context(pair.outside.spawn(*serving)).receive() == "listening"
            there = (apps.hold, SocketAddress(ip, 80), 1, PATIENT)
            waiting.append(stack.enter_context(pair.client.spawn(*there)))
        for victim in waiting:
            assert victim.receive(30) == {0: errno.ECONNRESET}


def test_a_crowd_that_never_begins_a_handshake(
    pair, app, stranger, hbone, target, friend, others_go_on
):
    """Three thousand connections: most are closed at once, and a stranger still gets a tunnel."""
    with (
        others_go_on(16 * MIB, at_least=20),
        pair.outside.spawn(stubborn.crowd, hbone, 3000, uid=0, gid=0) as child,
    ):
        assert child.receive(30) == "crowded"
        pair.mesh.wait_until(lambda: child.ask("closed") > 2900, "most of the crowd gone")
        headers = attacker.connect_headers(str(target))
        seen = stranger.run(attacker.attack, hbone, friend, headers)
    assert seen.statuses == [200]
