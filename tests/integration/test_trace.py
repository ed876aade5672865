"""`pyambient trace` of two pods that are enrolled, beside agent, proxy and apps."""

from __future__ import annotations

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import HBONE_PORT, OUTBOUND_PORT
from tests.bed import apps
from tests.bed.patience import patience

from .conftest import Pair
from .tracing import is_anybody_reading, tracing

# Those that tell what they decide.
pytestmark = pytest.mark.parametrize("backend", ["bpf", "tc"], scope="module")


def test_one_connection(pair: Pair, family: str) -> None:
    """From its capture to the app at the other end, under the pods' names, and nothing stays."""
    to = SocketAddress(pair.server.address(family), 8080)
    with pair.serve(pair.server, 8080), tracing(pair) as trace:
        assert trace.said == "tracing every pod; ^C ends it\n"
        assert is_anybody_reading()
        assert pair.client.run(apps.request, to, b"hello").data == b"hello"
        events = trace.until("delivered")
        assert trace.end().endswith(" events shown, 0 lost\n")
    assert not is_anybody_reading()
    captured, *tunnels, delivered = events
    assert (captured["decision"], captured["netns"]) == ("captured", "client")
    assert (captured["pod"], captured["destination"]) == ("default/client", str(to))
    assert captured["listener"] == OUTBOUND_PORT
    assert (delivered["pod"], delivered["destination"]) == ("default/server", str(to))
    assert {event["listener"] for event in tunnels} <= {HBONE_PORT}


def test_one_pod(pair: Pair, family: str) -> None:
    """What others do is left out."""
    to = SocketAddress(pair.server.address(family), 8080)
    with pair.serve(pair.server, 8080), tracing(pair, "server") as trace:
        assert trace.said == "tracing server; ^C ends it\n"
        assert pair.client.run(apps.request, to, b"hello").data == b"hello"
        assert {event["netns"] for event in trace.until("delivered")} == {"server"}
        trace.end()


def test_who_has_seen_enough(pair: Pair) -> None:
    """`trace | head` ends without a word, and what it had is given back."""
    with tracing(pair) as trace:
        assert trace.process.stdout is not None
        trace.process.stdout.close()
        pair.client.run(apps.request, SocketAddress(pair.outside.ipv4, 8080))
        assert trace.process.wait(patience(20)) == 1
        assert trace.process.stderr is not None
        assert trace.process.stderr.read() == ""
    assert not is_anybody_reading()
