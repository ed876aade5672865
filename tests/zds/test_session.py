"""Who may say what when, on both ends of a ZDS connection, by byte exchange in memory."""

from __future__ import annotations

import pytest

from pyambient.model.workload import PodRef
from pyambient.zds.messages import (
    Ack,
    Add,
    Del,
    Hello,
    Keep,
    Request,
    SnapshotSent,
    ZdsError,
    encode_ack,
    encode_request,
)
from pyambient.zds.session import AgentSession, ProxySession

ADD_A = Add(PodRef("a", "a", "default", "a"))
ADD_B = Add(PodRef("b", "b", "default", "b"))


def greeted() -> tuple[AgentSession, ProxySession]:
    """Both ends after the hello."""
    agent, proxy = AgentSession(), ProxySession()
    assert agent.receive(proxy.hello()) == Hello()
    return agent, proxy


def exchange(agent: AgentSession, proxy: ProxySession, request: Request, error: str = "") -> Ack:
    """One request there, its ack back."""
    got = proxy.receive(agent.request(request), descriptors=isinstance(request, Add))
    assert got == request
    ack = agent.receive(proxy.acknowledge(error))
    assert isinstance(ack, Ack)
    return ack


def live(*requests: Request) -> tuple[AgentSession, ProxySession]:
    """Both ends after a snapshot of these requests."""
    agent, proxy = greeted()
    for request in (*requests, SnapshotSent()):
        assert exchange(agent, proxy, request) == Ack()
    return agent, proxy


def test_a_snapshot_names_the_pods_to_go_on_with() -> None:
    """Add and Keep name a pod, Del takes the name back; what is left is kept at SnapshotSent."""
    agent, proxy = live(ADD_A, ADD_B, Keep("c"), Del("b"))
    assert proxy.named == {"a", "c"}
    assert proxy.live
    assert agent.snapshot_sent


def test_a_failed_add_leaves_the_connection_as_it_is() -> None:
    """An ack with an error is an answer like any other."""
    agent, proxy = greeted()
    assert exchange(agent, proxy, ADD_A, "no") == Ack("no")
    assert exchange(agent, proxy, ADD_B) == Ack()


def test_changes_follow_the_snapshot() -> None:
    """Once live, pods come and go one by one."""
    agent, proxy = live(ADD_A)
    assert exchange(agent, proxy, ADD_B) == Ack()
    assert exchange(agent, proxy, Del("a")) == Ack()


@pytest.mark.parametrize("request_", [Keep("a"), SnapshotSent()])
def test_snapshot_messages_are_over_once_it_is_sent(request_: Request) -> None:
    """A ztunnel ends itself over these two, so neither end lets them through."""
    agent, proxy = live()
    with pytest.raises(ZdsError, match="after the snapshot"):
        agent.request(request_)
    with pytest.raises(ZdsError, match="after the snapshot"):
        proxy.receive(encode_request(request_), descriptors=0)


def test_one_request_is_outstanding_at_a_time() -> None:
    """An ack names no request, so there is never a second one to confuse it with."""
    agent, _ = greeted()
    agent.request(ADD_A)
    with pytest.raises(ZdsError, match="out of turn"):
        agent.request(ADD_B)


def test_nothing_is_sent_before_the_hello() -> None:
    """A peer that has not said its version gets no network namespace."""
    with pytest.raises(ZdsError, match="out of turn"):
        AgentSession().request(ADD_A)


def test_an_ack_must_answer_something() -> None:
    """One ack too many would be taken for the next request's."""
    agent, _ = greeted()
    with pytest.raises(ZdsError, match="answers nothing"):
        agent.receive(encode_ack(Ack()))


@pytest.mark.parametrize(
    ("request_", "descriptors"), [(ADD_A, 0), (ADD_A, 2), (Del("a"), 1), (SnapshotSent(), 1)]
)
def test_an_add_and_only_an_add_carries_one_descriptor(request_: Request, descriptors: int) -> None:
    """A namespace too many or too few is a protocol error, and still owes its ack."""
    _, proxy = greeted()
    with pytest.raises(ZdsError, match="file descriptors"):
        proxy.receive(encode_request(request_), descriptors)
    assert proxy.acknowledge("no") == encode_ack(Ack("no"))


def test_each_request_is_acknowledged_once() -> None:
    """The proxy's end refuses to say yes twice."""
    _, proxy = greeted()
    proxy.receive(encode_request(Del("a")), descriptors=0)
    proxy.acknowledge()
    with pytest.raises(ZdsError, match="nothing to acknowledge"):
        proxy.acknowledge()
