"""What a process of the proxy needs, a worker or the parent of workers."""

from __future__ import annotations

import resource
import signal

import trio


def raise_descriptor_limit() -> None:
    """Two per proxied connection, one per pod: the soft limit of 1024 is soon reached."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def asked_to_stop() -> None:
    """Wait for SIGTERM or SIGINT."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            return
