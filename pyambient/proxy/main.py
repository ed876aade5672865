"""The proxy process: one worker, the loop that hosts it, and what runs beside the byte path."""

from __future__ import annotations

import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from pyambient.children import stop_with
from pyambient.engine.collector import calm
from pyambient.engine.loop import Loop
from pyambient.engine.scheduling import shorten_slices
from pyambient.identity.ca import EmbeddedAuthority
from pyambient.identity.store import CertificateStore
from pyambient.mesh.localfile import follow
from pyambient.mesh.view import MeshView
from pyambient.observe.accesslog import AccessLog
from pyambient.observe.logs import configure, get_logger
from pyambient.observe.sink import LineSink

from . import sockets
from .budgets import Limits
from .details_client import answer_details, serve_details
from .neighbours import Neighbours
from .pods import Pods
from .process import asked_to_stop, raise_descriptor_limit
from .settings import ProxySettings, Seat
from .worker import Worker
from .zds_client import ZdsClient, serve_zds

_log = get_logger("proxy")


def run(settings: ProxySettings, seat: Seat | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain. PyambientError if it cannot start.

    With a seat it is one worker of several, and serves the pods that its parent hands over.
    """
    raise_descriptor_limit()
    sink = LineSink(sys.stderr.fileno(), settings.log_format)
    common = {} if seat is None else {"worker": seat.number}
    configure(settings.log_format, settings.log_level, sink.put, common)
    if seat is not None:
        stop_with(seat.parent)
        sockets.take_place(sockets.Place(seat.number, settings.workers))
    loop = Loop(_report)
    loop.run(_main, settings, seat, loop, sink)


def _report(error: BaseException, owner: object) -> None:
    _log.error("internal error, one connection is given up", owner=repr(owner), exc_info=error)


async def _main(settings: ProxySettings, seat: Seat | None, loop: Loop, sink: LineSink) -> None:
    authority = EmbeddedAuthority.open(settings.ca_dir, settings.trust_domain)
    certificates = CertificateStore(authority)
    view = MeshView(settings.trust_domain)
    if settings.mesh is not None:
        view.load(settings.mesh)
    access_log = AccessLog(settings.log_format, sink.put, settings.log_level)
    limits = Limits.of_process(settings.workers)
    worker = Worker(loop, view, certificates, access_log, settings.trust_domain, limits=limits)
    async with trio.open_nursery() as nursery:
        pods = Pods(worker, nursery, Neighbours() if settings.direct else None)
        view.on_change = pods.mesh_changed
        if settings.mesh is not None:
            nursery.start_soon(follow, settings.mesh, view)
        for task in (sink.run, worker.run_deadlines, certificates.run):
            nursery.start_soon(task)
        if seat is None:
            await nursery.start(serve_details, settings.run_dir / "details.sock", pods)
            await nursery.start(serve_zds, settings.run_dir / "zds.sock", pods)
        else:
            _obey(seat, pods, nursery)
        calm()
        shorten_slices()
        _log.info("proxy ready", trust_domain=settings.trust_domain)
        await asked_to_stop()
        _log.info("draining", seconds=settings.drain_timeout)
        await pods.drain_all(settings.drain_timeout)
        nursery.cancel_scope.cancel()


def _obey(seat: Seat, pods: Pods, nursery: trio.Nursery) -> None:
    """Serve what the parent says. It ends this process when it is at an end itself."""
    nursery.start_soon(_converse, seat.details, partial(answer_details, handler=pods))
    nursery.start_soon(_converse, seat.zds, ZdsClient(pods).converse)


async def _converse(
    descriptor: int, converse: Callable[[trio.socket.SocketType], Awaitable[bool]]
) -> None:
    with trio.socket.from_stdlib_socket(socket.socket(fileno=descriptor)) as connection:
        await converse(connection)
