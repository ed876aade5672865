"""Watching an enrolled pod: its network, what was added to it, and whether it is still there.

Addresses and devices, routes and rules, filters of tc and rules of nf_tables are pushed by the
kernel, to netlink sockets that live in the pod. The end of a namespace is not: it is asked for once
a second, see `locate`.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, Self

import trio

from pyambient.errors import PyambientError
from pyambient.observe.logs import get_logger

from .enrolled import Enrolled
from .locate import in_use, is_replaced
from .records import NetnsRef

# Of linux/rtnetlink.h: RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR, and for what is ours
# RTMGRP_TC, RTMGRP_IPV4_ROUTE, RTMGRP_IPV4_RULE, RTMGRP_IPV6_ROUTE, RTNLGRP_IPV6_RULE.
_NETWORK: Final = 0x1 | 0x10 | 0x100
_OURS: Final = 0x8 | 0x40 | 0x80 | 0x400 | 1 << 18
# RTM_NEWLINK to RTM_DELADDR: what a plan is made from.
_ABOUT_NETWORK: Final = frozenset((16, 17, 20, 21))
_NETLINK_NETFILTER: Final = 12
_NF_TABLES: Final = 1 << 6  # NFNLGRP_NFTABLES
_NETFILTER: Final = ("iptables-", "nftables-")
_HEADER: Final = struct.Struct("=IH10x")
_OVERRUN: Final = 4  # NLMSG_OVERRUN
_BUFFER: Final = 64 << 10
# A device that comes up sends a handful of messages; one look at the end is enough.
_SETTLING: Final = 0.05
_FIRST_RETRY: Final = 1.0
_LAST_RETRY: Final = 60.0
_ROLL_CALL: Final = 1.0
_log = get_logger("watcher")
_Handler = Callable[[], Awaitable[None]]


async def watch_network(enrolled: Enrolled, changed: _Handler, touched: _Handler) -> None:
    """Await `changed` now and after each change of the pod's links and addresses, for ever.

    After other changes, of which some are to what we added, it is `touched`. One that fails is
    logged and tried again, after a second at first.
    """
    with _Events(enrolled) as events:
        await _until_handled(enrolled, changed)
        while True:
            await events.wait()
            await trio.sleep(_SETTLING)
            await _until_handled(enrolled, changed if events.take() else touched)


class _Events:
    """What the kernel tells of a pod, by a socket for each netlink family that matters to it."""

    def __init__(self, enrolled: Enrolled) -> None:
        self._enrolled = enrolled
        self._sockets = [self._listen(socket.NETLINK_ROUTE, _NETWORK | _OURS)]

    def _listen(self, family: int, groups: int) -> socket.socket:
        events = self._enrolled.netns.socket(socket.AF_NETLINK, socket.SOCK_RAW, family)
        events.bind((0, groups))
        events.setblocking(False)
        return events

    async def wait(self) -> None:
        """Wait until there is something to take."""
        if len(self._sockets) == 1 and self._has_rules():
            self._sockets.append(self._listen(_NETLINK_NETFILTER, _NF_TABLES))
        async with trio.open_nursery() as nursery:
            for events in self._sockets:
                nursery.start_soon(self._wait_for, events, nursery.cancel_scope)

    def _has_rules(self) -> bool:
        """Whether rules of ours are in there; to listen for others would load nf_tables."""
        return any(step.kind.startswith(_NETFILTER) for step in self._enrolled.record.steps)

    @staticmethod
    async def _wait_for(events: socket.socket, scope: trio.CancelScope) -> None:
        await trio.lowlevel.wait_readable(events)
        scope.cancel()

    def take(self) -> bool:
        """Read what is queued; whether links or addresses were among it, or may have been."""
        routing, *others = self._sockets
        for events in others:
            _read_all(events)
        return bool(_read_all(routing) & (_ABOUT_NETWORK | {_OVERRUN}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for events in self._sockets:
            events.close()

    def __repr__(self) -> str:
        return f"<Events of {self._enrolled.record.pod}>"


def _read_all(events: socket.socket) -> set[int]:
    """The types of the messages that are queued."""
    kinds: set[int] = set()
    while True:
        try:
            messages = events.recv(_BUFFER)
        except BlockingIOError:
            return kinds
        except OSError as error:
            # The kernel had more to say than the queue could hold (netlink(7)).
            if error.errno != errno.ENOBUFS:
                raise
            kinds.add(_OVERRUN)
        else:
            kinds |= _kinds(messages)


def _kinds(messages: bytes) -> set[int]:
    kinds, start = set(), 0
    while start + _HEADER.size <= len(messages):
        size, kind = _HEADER.unpack_from(messages, start)
        kinds.add(kind)
        start += (max(size, _HEADER.size) + 3) & ~3
    return kinds


async def _until_handled(enrolled: Enrolled, changed: _Handler) -> None:
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


class Fate(NamedTuple):
    """What became of a namespace: another has its name; nobody but us holds it any more."""

    replaced: bool
    gone: bool


async def watch_existence(enrolled: Enrolled, known: Fate) -> Fate:
    """Return when the pod's network namespace has met another fate than is known.

    Twice in a row: between a container's first process and its namespace's name, or while a
    runtime replaces the one by the other, there may be a moment with neither.
    """
    last = known
    while True:
        await trio.sleep(_ROLL_CALL)
        fate = await trio.to_thread.run_sync(_fate, enrolled.record.netns)
        if fate == last != known:
            return fate
        last = fate


def _fate(ref: NetnsRef) -> Fate:
    return Fate(is_replaced(ref), not in_use(ref))
