"""Our agent's two servers over real sockets; the test is the proxy, of our make or another's."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from pyambient.agent import zds_server
from pyambient.agent.config import RunDir
from pyambient.agent.kernel import KernelQueue
from pyambient.agent.proxies import Proxies
from pyambient.errors import PyambientError
from pyambient.model.ports import Ports
from pyambient.netns import Netns
from pyambient.proxy.details_client import serve_details
from pyambient.proxy.zds_client import serve_zds
from pyambient.zds.details import Answer, PodDetails, encode_answer
from pyambient.zds.messages import (
    Ack,
    Add,
    Del,
    SnapshotSent,
    encode_ack,
)
from tests.zds.peer import HELLO, ONE, TWO, Handler, Other


class Servers:
    """Our agent's two servers, and connections to them as a proxy makes them."""

    def __init__(self, directory: Path, connections: contextlib.ExitStack) -> None:
        self.connections = connections
        self.run_dir = RunDir(directory)
        self.details_path, self.zds_path = self.run_dir.details_socket, self.run_dir.zds_socket
        self.proxies = Proxies(KernelQueue())
        self.details, self.zds = self.proxies._details, self.proxies._zds

    async def connect(self, path: Path) -> Other:
        connection = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connections.enter_context(connection)
        await connection.connect(str(path))
        return Other(connection)

    async def proxy(self) -> Other:
        """A proxy that has said hello."""
        proxy = await self.connect(self.zds_path)
        await proxy.connection.send(HELLO)
        return proxy

    async def live_proxy(self) -> Other:
        """A proxy that has got an empty snapshot, and is the newest."""
        proxy = await self.proxy()
        assert await proxy.obey("") == [SnapshotSent()]
        with trio.fail_after(20):
            while not self.zds.proxies[-1].ready.is_set():
                await trio.lowlevel.checkpoint()
        return proxy


def with_servers(directory: Path, talk: Callable[[Servers], Awaitable[None]]) -> None:
    """Run our servers while the test talks to them as a proxy."""

    async def main(connections: contextlib.ExitStack) -> None:
        servers = Servers(directory, connections)
        async with trio.open_nursery() as nursery:
            await nursery.start(servers.proxies.serve, servers.run_dir)
            with trio.fail_after(20):
                await talk(servers)
            nursery.cancel_scope.cancel()

    with contextlib.ExitStack() as connections:
        trio.run(main, connections)


@pytest.fixture(autouse=True)
def of_another_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's proxies have no details channel; nobody waits long for that."""
    monkeypatch.setattr("pyambient.agent.zds_server.INTRODUCTION_TIMEOUT", 0.01)


def test_a_new_proxy_is_told_of_every_pod(tmp_path: Path) -> None:
    """Add for each with its namespace, then SnapshotSent; a nack of one spares the others."""
    with Netns.empty() as one, Netns.empty() as two:

        async def talk(servers: Servers) -> None:
            servers.zds.adopt(ONE, one)
            servers.zds.adopt(TWO, two)
            proxy = await servers.proxy()
            request, (descriptor,) = await proxy.asked()
            assert request == Add(ONE)
            with Netns(descriptor, "passed") as passed:
                assert passed.key == one.key
            await proxy.connection.send(encode_ack(Ack("no")))
            assert await proxy.obey("", "") == [Add(TWO), SnapshotSent()]

        with_servers(tmp_path, talk)


def test_adds_go_to_the_newest_and_dels_to_all(tmp_path: Path) -> None:
    """As in an upgrade: the old proxy learns of no new pod, but of each one's end."""
    with Netns.empty() as one:

        async def talk(servers: Servers) -> None:
            old, new = await servers.live_proxy(), await servers.live_proxy()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(change, servers)
                assert await new.obey("") == [Add(ONE)]
                assert await old.obey("") == [Del("u1")]
                assert await new.obey("") == [Del("u1")]

        async def change(servers: Servers) -> None:
            await servers.zds.add(ONE, one, patience=5)
            await servers.zds.remove("u1")

        with_servers(tmp_path, talk)


def test_an_add_waits_for_a_proxy(tmp_path: Path) -> None:
    """One that connects within the patience gets the pod."""
    with Netns.empty() as one:

        async def talk(servers: Servers) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(servers.zds.add, ONE, one, 5)
                proxy = await servers.live_proxy()
                assert await proxy.obey("") == [Add(ONE)]

        with_servers(tmp_path, talk)


def test_an_add_without_a_proxy_fails_in_time(tmp_path: Path) -> None:
    """The patience is an enrolment's; a pod that failed is in no later snapshot."""
    with Netns.empty() as one:

        async def talk(servers: Servers) -> None:
            with pytest.raises(PyambientError, match="no proxy is connected"):
                await servers.zds.add(ONE, one, patience=0.01)
            await servers.live_proxy()

        with_servers(tmp_path, talk)


def test_a_proxy_that_dies_during_an_add_is_replaced_by_the_other(tmp_path: Path) -> None:
    """The enrolment succeeds if anybody serves the pod."""
    with Netns.empty() as one:

        async def talk(servers: Servers) -> None:
            old, new = await servers.live_proxy(), await servers.live_proxy()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(servers.zds.add, ONE, one, 5)
                request, (descriptor,) = await new.asked()
                os.close(descriptor)
                new.connection.close()
                assert request == Add(ONE)
                assert await old.obey("") == [Add(ONE)]

        with_servers(tmp_path, talk)


def test_a_nack_is_the_enrolments_failure(tmp_path: Path) -> None:
    """It is raised with the proxy's words, and the proxy is told to give the pod up."""
    with Netns.empty() as one:

        async def talk(servers: Servers) -> None:
            proxy = await servers.live_proxy()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(refused, servers)
                assert await proxy.obey("port 15001 is taken", "") == [Add(ONE), Del("u1")]

        async def refused(servers: Servers) -> None:
            with pytest.raises(PyambientError, match="port 15001 is taken"):
                await servers.zds.add(ONE, one, patience=5)

        with_servers(tmp_path, talk)


@pytest.mark.parametrize("packet", [b"\xff", b"\x08\x02", encode_ack(Ack())])
def test_a_proxy_that_breaks_the_protocol_is_hung_up_on(tmp_path: Path, packet: bytes) -> None:
    """Whatever comes in place of the hello gets no namespace, and the server goes on."""

    async def talk(servers: Servers) -> None:
        bad = await servers.connect(servers.zds_path)
        await bad.connection.send(packet)
        assert await bad.ended()
        await servers.live_proxy()

    with_servers(tmp_path, talk)


def test_an_ack_too_many_ends_the_connection(tmp_path: Path) -> None:
    """It would be taken for the answer to the next request."""

    async def talk(servers: Servers) -> None:
        proxy = await servers.live_proxy()
        await proxy.connection.send(encode_ack(Ack()))
        assert await proxy.ended()
        await servers.live_proxy()

    with_servers(tmp_path, talk)


def test_a_silent_proxy_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hello, or no ack, within the deadline: the connection ends, the server goes on."""
    monkeypatch.setattr("pyambient.agent.zds_server.EXCHANGE_TIMEOUT", 0.05)

    async def talk(servers: Servers) -> None:
        mute = await servers.connect(servers.zds_path)
        assert await mute.ended()
        half = await servers.proxy()
        assert await half.asked() == (SnapshotSent(), [])
        assert await half.ended()

    with_servers(tmp_path, talk)


def test_too_many_proxies_are_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connections are bounded; those that are there go on."""
    monkeypatch.setattr("pyambient.agent.zds_server.MAX_PROXIES", 1)
    with Netns.empty() as one:

        async def talk(servers: Servers) -> None:
            first = await servers.live_proxy()
            second = await servers.connect(servers.zds_path)
            assert await second.ended()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(servers.zds.add, ONE, one, 5)
                assert await first.obey("") == [Add(ONE)]

        with_servers(tmp_path, talk)


def test_our_two_ends_work_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Details are there before the Add, and a slow answer holds up no other."""
    monkeypatch.setattr("pyambient.agent.zds_server.INTRODUCTION_TIMEOUT", 20)
    handler = Handler()
    with Netns.empty() as one:

        async def talk(servers: Servers) -> None:
            await servers.details.describe("u1", PodDetails("bpf", ()))
            servers.zds.adopt(ONE, one)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_zds, servers.zds_path, handler)
                nursery.start_soon(serve_details, servers.details_path, handler)
                await servers.zds.add(TWO, one, patience=5)
                assert await drained_beside_a_slow_one(servers) == 3
                assert await servers.details.status("u1") is None
                nursery.cancel_scope.cancel()

        with_servers(tmp_path, talk)
    assert handler.calls[:3] == ["describe u1 bpf", "add u1", "retain ['u1']"]
    assert handler.calls[3:] == ["add u2", "drain slow 60", "drain u1 5"]


async def drained_beside_a_slow_one(servers: Servers) -> int | None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(servers.details.drain, "slow", 60)
        await trio.testing.wait_all_tasks_blocked()
        left = await servers.details.drain("u1", 5)
        nursery.cancel_scope.cancel()
    return left


def test_a_details_peer_that_talks_nonsense_is_hung_up_on(tmp_path: Path) -> None:
    """It is described to like any other, and its nonsense fails nobody."""

    async def talk(servers: Servers) -> None:
        await servers.details.describe("u1", PodDetails("bpf", ("10.0.0.2",)))
        bad = await servers.connect(servers.details_path)
        asked = json.loads(await bad.connection.recv(4096))
        assert asked["describe"] == "u1"
        await bad.connection.send(b"nonsense")
        assert await bad.ended()
        assert await servers.details.drain("u1", 1) is None

    with_servers(tmp_path, talk)


_MOVED = PodDetails("bpf", (), ports=Ports(outbound=15101))


async def described(details: Other) -> str:
    """Answer the next description; of which pod it was."""
    asked = json.loads(await details.connection.recv(4096))
    await details.connection.send(encode_answer(Answer(asked["id"])))
    return str(asked["describe"])


def test_a_proxy_that_is_told_slowly_is_not_taken_for_a_foreign_one(tmp_path: Path) -> None:
    """However long that takes: the pod is added when it is known, moved ports and all."""
    with Netns.empty() as one:

        async def talk(servers: Servers) -> None:
            await servers.details.describe("u1", _MOVED)
            servers.zds.adopt(ONE, one)
            details = await servers.connect(servers.details_path)
            proxy = await servers.proxy()
            with trio.move_on_after(10 * zds_server.INTRODUCTION_TIMEOUT):
                pytest.fail(f"it was told {await proxy.asked()} before it knew the pod")
            assert await described(details) == "u1"
            assert await proxy.obey("", "") == [Add(ONE), SnapshotSent()]

        with_servers(tmp_path, talk)


def test_a_proxy_that_lost_its_details_connection_is_not_taken_for_a_foreign_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is back the pod waits: its ports are to be known before the Add."""
    monkeypatch.setattr("pyambient.agent.zds_server.INTRODUCTION_TIMEOUT", 20)
    with Netns.empty() as one:

        async def talk(servers: Servers) -> None:
            first = await servers.connect(servers.details_path)
            proxy = await servers.live_proxy()
            first.connection.close()
            while servers.details._peers:
                await trio.lowlevel.checkpoint()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(servers.proxies.start, ONE, one, _MOVED, 5)
                await trio.testing.wait_all_tasks_blocked()
                second = await servers.connect(servers.details_path)
                assert await described(second) == "u1"
                assert await proxy.obey("") == [Add(ONE)]

        with_servers(tmp_path, talk)


def test_a_proxy_that_comes_late_for_its_details_gets_what_was_kept_back(tmp_path: Path) -> None:
    """As after an outage of the agent's, when each of its connections is tried at its own time."""
    with Netns.empty() as one:

        async def talk(servers: Servers) -> None:
            await servers.details.describe("u1", _MOVED)
            servers.zds.adopt(ONE, one)
            proxy = await servers.proxy()
            assert await proxy.obey("") == [SnapshotSent()]
            details = await servers.connect(servers.details_path)
            assert await described(details) == "u1"
            assert await proxy.obey("") == [Add(ONE)]

        with_servers(tmp_path, talk)


def test_who_has_a_port_may_be_hard_to_tell(tmp_path: Path) -> None:
    """A namespace that cannot be entered is no reason for the agent to end."""
    gone = Netns.empty()

    async def talk(servers: Servers) -> None:
        await servers.details.describe("u1", _MOVED)
        servers.zds.adopt(ONE, gone)
        gone.close()
        proxy = await servers.proxy()
        assert await proxy.obey("") == [SnapshotSent()]

    with_servers(tmp_path, talk)
