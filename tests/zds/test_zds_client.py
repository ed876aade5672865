"""Our proxy's end of ZDS, over a real socketpair with the fds of real network namespaces.

The test is the agent, and says what a real istio-cni says and what none should.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from pyambient.netns import Netns
from pyambient.proxy.zds_client import ZdsClient
from pyambient.zds.messages import (
    Ack,
    Add,
    Del,
    Keep,
    Request,
    SnapshotSent,
    encode_request,
)

from .peer import HELLO, ONE, TWO, Handler, Other, open_descriptors


def as_agent(handler: Handler, talk: Callable[[Other], Awaitable[None]]) -> ZdsClient:
    """Let the test talk to our client as an agent would, until either hangs up."""
    client = ZdsClient(handler)

    async def main() -> None:
        ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(converse, ours)
                assert await theirs.recv(64) == HELLO
                await talk(Other(theirs))
                theirs.close()

    async def converse(ours: trio.socket.SocketType) -> None:
        with ours:
            await client.converse(ours)

    trio.run(main)
    return client


def test_a_pod_is_served_in_its_own_namespace() -> None:
    """The fd that came is the namespace that is served; nothing is left open afterwards."""
    handler, before = Handler(), open_descriptors()
    with Netns.empty() as one, Netns.empty() as two:

        async def talk(agent: Other) -> None:
            assert await agent.ask(Add(ONE), one.fd) == Ack()
            assert await agent.ask(Keep("u9")) == Ack()
            assert await agent.ask(SnapshotSent()) == Ack()
            assert await agent.ask(Add(TWO), two.fd) == Ack()
            assert await agent.ask(Del("u1")) == Ack()
            assert await agent.ask(Del("unknown")) == Ack()

        as_agent(handler, talk)
        assert handler.keys == [one.key, two.key]
    assert handler.calls == [
        "add u1",
        "retain ['u1', 'u9']",
        "add u2",
        "remove u1",
        "remove unknown",
    ]
    assert open_descriptors() == before


def test_a_known_pod_is_acknowledged_and_left_alone() -> None:
    """The same namespace again is no work; another one under the same uid takes its place."""
    handler = Handler()
    with Netns.empty() as one, Netns.empty() as two:

        async def talk(agent: Other) -> None:
            for netns in (one, one, two):
                assert await agent.ask(Add(ONE), netns.fd) == Ack()

        as_agent(handler, talk)
    assert handler.calls == ["add u1", "add u1"]


def test_a_del_before_the_snapshot_is_only_a_name() -> None:
    """What is no longer named is stopped by the snapshot, and not before."""
    handler = Handler()
    with Netns.empty() as one:

        async def talk(agent: Other) -> None:
            assert await agent.ask(Add(ONE), one.fd) == Ack()
            assert await agent.ask(Del("u1")) == Ack()
            assert handler.calls == ["add u1"]
            assert await agent.ask(SnapshotSent()) == Ack()

        as_agent(handler, talk)
    assert handler.calls == ["add u1", "retain []"]


def test_a_failed_pod_is_acknowledged_with_ztunnels_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The connection goes on; the pod is tried again until it works or is given up."""
    monkeypatch.setattr("pyambient.proxy.zds_client.PENDING_RETRY", 0.01)
    handler, before = Handler("one", "two"), open_descriptors()
    with Netns.empty() as one, Netns.empty() as two:

        async def talk(agent: Other) -> None:
            refusal = Ack("failure to start proxy : not wanted; ask for another")
            assert await agent.ask(Add(ONE), one.fd) == refusal
            assert await agent.ask(Add(TWO), two.fd) == refusal
            assert await agent.ask(SnapshotSent()) == Ack()
            assert await agent.ask(Del("u2")) == Ack()
            handler.calls.clear()
            handler.refusing.clear()
            handler.called = trio.Event()
            await handler.called.wait()
            assert await agent.ask(Add(ONE), one.fd) == Ack()

        as_agent(handler, talk)
    assert handler.calls == ["add u1"]
    assert open_descriptors() == before


def test_what_is_no_namespace_is_refused() -> None:
    """A file in the place of a namespace is this pod's failure, not the connection's."""
    handler = Handler()
    with Path("/proc/self/status").open() as file:

        async def talk(agent: Other) -> None:
            ack = await agent.ask(Add(ONE), file.fileno())
            assert "failure to start proxy" in ack.error
            assert "not a network namespace" in ack.error
            assert await agent.ask(SnapshotSent()) == Ack()

        as_agent(handler, talk)
    assert handler.calls == ["retain ['u1']"]


BREACHES = {
    "add without fd": (encode_request(Add(ONE)), 0),
    "add with two": (encode_request(Add(ONE)), 2),
    "add with too many to take": (encode_request(Add(ONE)), 30),
    "del with fd": (encode_request(Del("u1")), 1),
    "not a request": (b"\xff\xff", 0),
    "a packet that fills the buffer": (b"\0" * 1024, 0),
    "a packet that does not fit": (b"\0" * 1500, 0),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_of_the_protocol_ends_the_connection(breach: str) -> None:
    """It is acknowledged with an error, once; no fd that came is kept, and nothing is served."""
    packet, count = BREACHES[breach]
    handler, before = Handler(), open_descriptors()
    with Netns.empty() as one:

        async def talk(agent: Other) -> None:
            ack = await agent.ask(packet, *[one.fd] * count)
            assert ack.error.startswith("failure to process message : ")
            assert await agent.ended()

        as_agent(handler, talk)
    assert handler.calls == []
    assert open_descriptors() == before


@pytest.mark.parametrize("late", [Keep("u1"), SnapshotSent()])
def test_a_second_snapshot_is_a_breach(late: Request) -> None:
    """A ztunnel ends itself over it; we end the connection and get a fresh snapshot."""

    async def talk(agent: Other) -> None:
        assert await agent.ask(SnapshotSent()) == Ack()
        assert "after the snapshot" in (await agent.ask(late)).error
        assert await agent.ended()

    as_agent(Handler(), talk)
