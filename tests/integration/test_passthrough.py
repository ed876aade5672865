"""Bulk without a tunnel: to and from what is outside the mesh, through pipes of the proxy."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pyambient.model.address import SocketAddress
from tests.bed import ClientOptions, apps
from tests.bed.memory import bounded_growth

from . import stubborn
from .conftest import Pair

MIB = 1 << 20
_PORT = 8089
_PATIENT = ClientOptions(timeout=30)
# Ends of pipes that a proxy keeps while nobody needs them.
_FREE_PIPES = 2 * 8
_STUCK = 4


def _proxies(pair: Pair) -> list[int]:
    return [int(pid) for pid in (pair.bed.cgroup.proxy / "cgroup.procs").read_text().split()]


def _ends_of_pipes(pair: Pair) -> int:
    """How many descriptors of the proxy are a pipe's."""
    count = 0
    for pid in _proxies(pair):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                count += str(link.readlink()).startswith("pipe:")
    return count


def _line(pair: Pair, direction: str, source: SocketAddress | None) -> None:
    """What is logged of a connection that has moved as much either way."""
    wanted = {"direction": direction, "src.addr": str(source)}
    (line,) = pair.mesh.access_log(wanted | {"bytes_sent": 8 * MIB, "bytes_recv": 8 * MIB})
    assert "error" not in line


def test_bulk_goes_out_and_comes_back_whole(pair: Pair, family: str) -> None:
    """By pipes, as descriptors tell; the access log counts what went by them."""
    payload, there = os.urandom(8 * MIB), SocketAddress(pair.outside.address(family), _PORT)
    before = _ends_of_pipes(pair)
    with pair.serve(pair.outside, _PORT):
        seen = pair.client.run(apps.request, there, payload, _PATIENT)
    assert seen.errno is None
    assert seen.data == payload
    _line(pair, "outbound", seen.local)
    assert 2 <= _ends_of_pipes(pair) <= before + _FREE_PIPES


def test_bulk_comes_in_and_goes_back_whole(pair: Pair, family: str) -> None:
    payload, there = os.urandom(8 * MIB), SocketAddress(pair.server.address(family), _PORT)
    with pair.serve(pair.server, _PORT):
        seen = pair.outside.run(apps.request, there, payload, _PATIENT)
    assert seen.errno is None
    assert seen.data == payload
    _line(pair, "inbound", seen.local)


def test_an_app_that_stops_reading_holds_up_who_sends_to_it(pair: Pair, family: str) -> None:
    """And nobody else; what is kept for it is a pipe's fill, and gone with it."""
    deaf = SocketAddress(pair.server.address(family), _PORT)
    other = SocketAddress(pair.server.address(family), _PORT + 1)
    before = _ends_of_pipes(pair)
    with (
        bounded_growth(_proxies(pair), 8 * MIB),
        pair.serve(pair.server, _PORT + 1),
        pair.server.spawn(stubborn.deaf_app, _PORT, first=4 * MIB) as app,
        contextlib.ExitStack() as stack,
    ):
        assert app.receive() == "listening"
        for _ in range(_STUCK):
            child = stack.enter_context(pair.outside.spawn(stubborn.firehose, deaf))
            assert child.receive(20) == "stuck"
        assert pair.outside.run(apps.request, other, bytes(4 * MIB)).data == bytes(4 * MIB)
        assert 2 <= _ends_of_pipes(pair) <= before + 2 * _STUCK + _FREE_PIPES
    pair.mesh.wait_until(lambda: _ends_of_pipes(pair) <= before + _FREE_PIPES, "free pipes")
