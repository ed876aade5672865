"""`pyambient trace` that begins before its pods, outlives them, or is killed."""

from __future__ import annotations

import os
import signal

import pytest

from pyambient.model.address import SocketAddress
from tests.bed import apps
from tests.bed.patience import patience

from .conftest import Pair
from .tracing import is_anybody_reading, tracing

# Those that tell what they decide.
pytestmark = pytest.mark.parametrize("backend", ["bpf", "tc"], scope="module")


def test_a_killed_trace_is_cleared_up(strangers: Pair) -> None:
    """By the agent, when its lease is over."""
    strangers.enroll()
    with tracing(strangers) as trace:
        assert trace.said.startswith("tracing")
        os.kill(trace.process.pid, signal.SIGKILL)
        trace.process.wait(patience(20))
    assert is_anybody_reading()
    strangers.mesh.wait_until(lambda: not is_anybody_reading(), "cleared place", 30)


def test_it_waits_for_pods_and_outlives_them(strangers: Pair) -> None:
    """The last one takes programs and maps along; the next one is traced again, before long."""
    with tracing(strangers) as trace:
        assert trace.said.startswith("note: no pod is enrolled with backend bpf or tc")
        for port in (8080, 8081):
            strangers.mesh.enroll(strangers.client, backend=strangers.backend)
            to = SocketAddress(strangers.outside.ipv4, port)
            with strangers.serve(strangers.outside, port):
                while True:
                    assert strangers.client.run(apps.request, to, b"hello").data == b"hello"
                    if trace.is_told(0.5):
                        break
            while (event := trace.until("captured")[-1])["destination"] != str(to):
                pass
            assert event["pod"] == "default/client"
            strangers.mesh.unenroll(strangers.client)
        trace.end()
