"""The proxy process: one worker, the loop that hosts it, and what runs beside the byte path."""

from __future__ import annotations

import resource
import signal
import sys

import trio

from pyambient.engine.collector import calm
from pyambient.engine.loop import Loop
from pyambient.engine.scheduling import SLICE, shorten_slices
from pyambient.identity.ca import EmbeddedAuthority
from pyambient.identity.store import CertificateStore
from pyambient.mesh.localfile import follow
from pyambient.mesh.view import MeshView
from pyambient.observe.accesslog import AccessLog
from pyambient.observe.logs import configure, get_logger
from pyambient.observe.sink import LineSink

from .details_client import serve_details
from .neighbours import Neighbours
from .pods import Pods
from .settings import ProxySettings
from .worker import Worker
from .zds_client import serve_zds

_log = get_logger("proxy")


def run(settings: ProxySettings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. PyambientError if it cannot start."""
    _raise_descriptor_limit()
    sink = LineSink(sys.stderr.fileno(), settings.log_format)
    configure(settings.log_format, settings.log_level, sink.put)
    loop = Loop(_report)
    loop.run(_main, settings, loop, sink)


def _raise_descriptor_limit() -> None:
    """Two descriptors per proxied connection: the soft limit of 1024 is soon reached."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _report(error: BaseException, owner: object) -> None:
    _log.error("internal error, one connection is given up", owner=repr(owner), exc_info=error)


async def _main(settings: ProxySettings, loop: Loop, sink: LineSink) -> None:
    authority = EmbeddedAuthority.open(settings.ca_dir, settings.trust_domain)
    certificates = CertificateStore(authority)
    view = MeshView(settings.trust_domain)
    if settings.mesh is not None:
        view.load(settings.mesh)
    access_log = AccessLog(settings.log_format, sink.put, settings.log_level)
    worker = Worker(loop, view, certificates, access_log, settings.trust_domain)
    async with trio.open_nursery() as nursery:
        pods = Pods(worker, nursery, Neighbours() if settings.direct else None)
        view.on_change = pods.mesh_changed
        if settings.mesh is not None:
            nursery.start_soon(follow, settings.mesh, view)
        for task in (sink.run, worker.run_deadlines, certificates.run):
            nursery.start_soon(task)
        await nursery.start(serve_details, settings.run_dir / "details.sock", pods)
        await nursery.start(serve_zds, settings.run_dir / "zds.sock", pods)
        calm()
        shorten_slices(SLICE)
        _log.info("proxy ready", trust_domain=settings.trust_domain)
        await _wait_for_signal()
        _log.info("draining", seconds=settings.drain_timeout)
        await pods.drain_all(settings.drain_timeout)
        nursery.cancel_scope.cancel()


async def _wait_for_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            return
