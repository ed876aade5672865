"""Connections from before the enrolment: counted, kept, or ended on demand."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

import pytest

from pyambient.model.address import SocketAddress
from tests.bed import BedPod, Channel, Child, apps

from .conftest import Pair

_PORT = 8080
_ENDED = (errno.ECONNABORTED, errno.EPIPE, errno.ECONNRESET)


def keep_talking(channel: Channel, destination: SocketAddress) -> None:
    """One connection; what it gets back for each message, or the errno."""
    with socket.create_connection((destination.ip, destination.port), timeout=5) as client:
        channel.send("connected")
        while True:
            try:
                client.sendall(channel.receive())
                channel.send(client.recv(100))
            except OSError as error:
                channel.send(error.errno)


@contextlib.contextmanager
def talking(strangers: Pair, family: str) -> Iterator[dict[str, Child]]:
    """Connections out of the client's pod, into it, and within it."""
    client, outside = strangers.client, strangers.outside
    ends = {"out": (client, outside), "in": (outside, client), "within": (client, client)}
    with contextlib.ExitStack() as stack:
        for pod in (client, outside):
            stack.enter_context(strangers.serve(pod, _PORT))
        talkers = {
            name: stack.enter_context(_connected(one, SocketAddress(other.address(family), _PORT)))
            for name, (one, other) in ends.items()
        }
        yield talkers


def _connected(pod: BedPod, destination: SocketAddress) -> Child:
    child = pod.spawn(keep_talking, destination)
    assert child.receive() == "connected"
    return child


def enroll(strangers: Pair, *words: str) -> str:
    """What the command says of the connections, after the line about the pod."""
    name = strangers.client.name
    identity = ("--namespace=default", "--service-account=client")
    done = strangers.mesh.cli("enroll", name, *identity, f"--backend={strangers.backend}", *words)
    return done.stdout.partition("\n")[2]


def counted(strangers: Pair) -> int:
    (pod,) = strangers.mesh.status()["pods"]
    return int(pod["existing"])


@pytest.mark.parametrize("words", [(), ("--existing=keep",)], ids=["by itself", "keep"])
def test_they_are_kept_and_counted(strangers: Pair, family: str, words: tuple[str, ...]) -> None:
    """Both directions go on, what stays inside is none, and the count follows."""
    with talking(strangers, family) as talkers:
        said = enroll(strangers, *words)
        assert said == "client: 2 connections from before the enrolment past the proxy\n"
        assert [child.ask(b"on") for child in talkers.values()] == [b"on"] * 3
        assert said in strangers.mesh.cli("status").stdout
        talkers["in"].kill()
        strangers.mesh.wait_until(lambda: counted(strangers) == 1, "the other connection")
    strangers.mesh.wait_until(lambda: counted(strangers) == 0, "the end of both")


def test_they_are_ended_on_demand(strangers: Pair, family: str) -> None:
    """Apps on both sides learn it; what comes next is captured, and the pod's own goes on."""
    with talking(strangers, family) as talkers:
        assert enroll(strangers, "--existing=close") == ""
        assert counted(strangers) == 0
        for name in ("out", "in"):
            assert talkers[name].ask(b"on") in (b"", *_ENDED)
        assert talkers["within"].ask(b"on") == b"on"
        there = SocketAddress(strangers.outside.address(family), _PORT)
        assert strangers.client.run(apps.request, there, b"again").data == b"again"


def test_they_are_ended_later(strangers: Pair, family: str) -> None:
    """Enrolled once more with that choice, and relayed connections are spared."""
    with talking(strangers, family) as talkers:
        enroll(strangers)
        there = SocketAddress(strangers.outside.address(family), _PORT)
        relayed = _connected(strangers.client, there)
        assert relayed.ask(b"on") == b"on"
        enroll(strangers, "--existing=close")
        assert talkers["out"].ask(b"on") in (b"", *_ENDED)
        assert talkers["in"].ask(b"on") in (b"", *_ENDED)
        assert [child.ask(b"on") for child in (relayed, talkers["within"])] == [b"on"] * 2
        assert counted(strangers) == 0
