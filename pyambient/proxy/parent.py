"""The parent process of several workers: it talks to the agent, and sees no traffic."""

from __future__ import annotations

import sys

import trio

from pyambient.children import ChildFailed
from pyambient.errors import root_cause
from pyambient.observe.logs import configure, get_logger
from pyambient.observe.sink import LineSink

from .details_client import serve_details
from .process import asked_to_stop, raise_descriptor_limit
from .settings import ProxySettings
from .workers import Workers
from .zds_client import serve_zds

_log = get_logger("proxy")


def run(settings: ProxySettings) -> None:
    """Keep the workers running until SIGTERM or SIGINT; they drain then.

    Ends with the code of a worker that cannot start, which has said why.
    """
    raise_descriptor_limit()
    sink = LineSink(sys.stderr.fileno(), settings.log_format)
    configure(settings.log_format, settings.log_level, sink.put)
    try:
        trio.run(_main, settings, sink)
    except BaseExceptionGroup as failures:
        if isinstance(failure := root_cause(failures), ChildFailed):
            raise SystemExit(max(failure.code, 1)) from None
        raise


async def _main(settings: ProxySettings, sink: LineSink) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sink.run)
        workers = Workers(settings)
        await nursery.start(workers.run)
        await nursery.start(serve_details, settings.run_dir / "details.sock", workers)
        await nursery.start(serve_zds, settings.run_dir / "zds.sock", workers)
        _log.info("proxy ready", workers=settings.workers)
        await asked_to_stop()
        _log.info("stopping the workers")
        nursery.cancel_scope.cancel()
