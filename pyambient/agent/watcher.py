"""Watching an enrolled pod: its addresses and devices, and whether it is still there.

Addresses and devices are pushed by the kernel (rtnetlink multicast, from a socket that lives in
the pod). The end of a namespace is not: it is asked for once a second, see `locate`.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from pyambient.errors import PyambientError
from pyambient.observe.logs import get_logger

from .enrolled import Enrolled
from .locate import in_use

# RTMGRP_LINK, RTMGRP_IPV4_IFADDR and RTMGRP_IPV6_IFADDR of linux/rtnetlink.h.
_GROUPS: Final = 0x1 | 0x10 | 0x100
_BUFFER: Final = 64 << 10
# A device that comes up sends a handful of messages; one look at the end is enough.
_SETTLING: Final = 0.05
_FIRST_RETRY: Final = 1.0
_LAST_RETRY: Final = 60.0
_ROLL_CALL: Final = 1.0
_log = get_logger("watcher")


async def watch_network(enrolled: Enrolled, changed: Callable[[], Awaitable[None]]) -> None:
    """Await `changed` now and after each change of the pod's links and addresses, for ever.

    A `changed` that fails is logged and tried again, after a second at first.
    """
    events = enrolled.netns.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    events.bind((0, _GROUPS))
    events.setblocking(False)
    with events:
        while True:
            await _until_handled(enrolled, changed)
            await trio.lowlevel.wait_readable(events)
            await trio.sleep(_SETTLING)
            _discard(events)


def _discard(events: socket.socket) -> None:
    """Read what is queued: that something changed is all we want to know."""
    while True:
        try:
            events.recv(_BUFFER)
        except BlockingIOError:
            return
        except OSError as error:
            # The kernel had more to say than the queue could hold (netlink(7)).
            if error.errno != errno.ENOBUFS:
                raise


async def _until_handled(enrolled: Enrolled, changed: Callable[[], Awaitable[None]]) -> None:
    delay = _FIRST_RETRY
    while True:
        try:
            return await changed()
        except (PyambientError, OSError) as error:
            _log.error("cannot follow a change", pod=str(enrolled.record.pod), error=str(error))
        except Exception as error:  # noqa: BLE001 - that the pod goes must still be noticed
            _log.error("internal error", pod=str(enrolled.record.pod), exc_info=error)
        await trio.sleep(delay)
        delay = min(delay * 2, _LAST_RETRY)


async def watch_existence(enrolled: Enrolled) -> None:
    """Return when nobody but us holds the pod's network namespace any more.

    Twice in a row: between a container's first process and its namespace's name, or while a
    runtime replaces the one by the other, there may be a moment with neither.
    """
    absences = 0
    while absences < 2:
        await trio.sleep(_ROLL_CALL)
        present = await trio.to_thread.run_sync(in_use, enrolled.record.netns)
        absences = 0 if present else absences + 1
