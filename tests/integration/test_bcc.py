"""The core of what pods are captured for, where bcc has compiled and loaded the programs.

`make test LOADER=bcc` runs all tests of interception by BPF that way.
"""

from __future__ import annotations

import socket
from typing import Any

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import PROXY_MARK, RESOLVER_PORT
from tests.bed import Child, apps, capturing, marking
from tests.bed.patience import patience
from tests.dns import build

from . import resolver
from .conftest import Pair, assert_all_tunnelled
from .resolver import Answered

pytestmark = [
    pytest.mark.parametrize("backend", ["bpf", "tc"], scope="module"),
    pytest.mark.timeout(patience(300)),  # with the compiler
]

_MARKER = b"plaintext that must not be on the wire"
_EXCLUDED_PORT = 8090


@pytest.fixture(scope="module")
def mesh_settings() -> dict[str, Any]:
    """The other loader."""
    return {"loader": "bcc"}


def test_traffic_is_tunnelled(pair: Pair, echo: Child, destination: SocketAddress) -> None:
    """Out of one pod and into the other, and the app sees who has called it."""
    with capturing(pair.client) as capture:
        seen = pair.client.run(apps.request, destination, _MARKER)
    assert (seen.data, seen.peer) == (_MARKER, destination)
    assert_all_tunnelled(capture, pair.client, pair.server, _MARKER)
    (accepted,) = echo.ask("accepted")
    assert accepted.peer.ip == seen.local.ip


def test_plain_text_comes_in_by_the_proxy(
    pair: Pair, echo: Child, destination: SocketAddress
) -> None:
    seen = pair.outside.run(apps.request, destination, b"from outside")
    assert seen.data == b"from outside"
    inbound = {"direction": "inbound", "dst.addr": str(destination)}
    assert len(pair.mesh.access_log(inbound)) == 1


def test_queries_are_asked_by_the_proxy(pair: Pair, family: str) -> None:
    """By UDP, connected and not, and by TCP."""
    address = SocketAddress(pair.outside.address(family), RESOLVER_PORT)
    query = build.query(0x4000)
    with pair.outside.spawn(resolver.resolver, uid=0, gid=0) as server:
        assert server.receive() == "listening"
        for connected in (False, True):
            answers = pair.client.run(resolver.ask, address, query, connected=connected)
            assert answers == [Answered(build.answer_to(query), address)]
        (whole,) = pair.client.run(resolver.ask_over_tcp, address, query)
        assert whole == build.answer_to(query)
        assert all(one.ident != 0x4000 for one in server.ask("seen"))


def test_what_is_excluded_goes_past_it(pair: Pair, family: str) -> None:
    """A port, chosen while the pod lives, and taken back."""
    there = SocketAddress(pair.server.address(family), _EXCLUDED_PORT)
    pair.mesh.cli("set", "client", "--exclude-outbound-ports", str(_EXCLUDED_PORT))
    pair.mesh.cli("set", "server", "--exclude-inbound-ports", str(_EXCLUDED_PORT))
    with pair.serve(pair.server, _EXCLUDED_PORT), capturing(pair.client) as capture:
        assert pair.client.run(apps.request, there, b"direct").data == b"direct"
        for pod, option in (("client", "outbound"), ("server", "inbound")):
            pair.mesh.cli("set", pod, f"--exclude-{option}-ports", "")
        assert pair.client.run(apps.request, there, _MARKER).data == _MARKER
    assert any(p.payload == b"direct" for p in capture.packets)
    assert not any(_MARKER in frame for frame in capture.frames)


def _freed_by_its_mark(to: SocketAddress) -> bytes:
    with socket.socket(to.family) as client:
        client.settimeout(2)
        client.connect(to.sockaddr())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK)
        client.sendall(_MARKER)
        try:
            return client.recv(100)
        except TimeoutError:
            return b""


def test_a_mark_frees_nobody(pair: Pair, echo: Child, destination: SocketAddress) -> None:
    """With `bpf` the guard drops what is sent then, with `tc` it is captured as before."""
    able = marking(pair.client)
    with capturing(pair.client) as capture:
        heard = pair.client.run(_freed_by_its_mark, destination, capabilities=able)
    assert heard == (_MARKER if pair.backend == "tc" else b"")
    assert not any(_MARKER in frame for frame in capture.frames)


def test_what_the_compiler_left_out_is_not_missed(pair: Pair) -> None:
    """Of a constant that is known to bcc it leaves out whole maps: nothing is lost for that."""
    for pod in ("client", "server"):
        pair.mesh.cli("verify", pod)
    assert [pod["repairs"] for pod in pair.mesh.status()["pods"]] == [{}, {}]
