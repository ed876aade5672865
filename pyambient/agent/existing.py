"""What a pod has from before its enrolment: connections to keep or to end, sockets of no more use.

Connections from before go on as they were, past the proxy, unless they are to be ended. The pod is
looked at when its gate is set, so none is missed; one that a netfilter backend captured in that
moment looks like them and counts, too. Their sockets' cookies are in the record: `status` tells how
many still live, and they can be ended later.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from pathlib import Path
from typing import Final

from pyambient.errors import PyambientError, UsageError
from pyambient.intercept import existing
from pyambient.intercept.existing import cgroups_of, existing_connections
from pyambient.intercept.options import CLOSE, KEEP
from pyambient.intercept.socket_diag import Socket, end, refuse_unable
from pyambient.model.backends import WITH_PROGRAMS
from pyambient.model.numbers import MARK_MASK, PROXY_MARK
from pyambient.netns import Netns
from pyambient.observe.logs import get_logger

from .enrolled import Enrolled
from .records import Record

_DNS_GATE: Final = "bpf-dns-gate"
_log = get_logger("existing")


def check_choice(choice: str, netns: Netns) -> None:
    """PyambientError unless this is what can be done with connections from before."""
    if choice not in ("", KEEP, CLOSE):
        raise UsageError(f"existing cannot be {choice!r}", f"give {KEEP} or {CLOSE}")
    if choice == CLOSE:
        refuse_unable(netns)


def note_existing(enrolled: Enrolled, proxy_cgroup: Path | None) -> Record:
    """The record with the connections that the pod has now; none where nobody can tell."""
    record = enrolled.record
    try:
        found = existing_connections(enrolled.netns)
    except PyambientError as error:
        _log.warning("connections from before are not counted", pod=str(record.pod), why=str(error))
        return record
    older = _of_apps(found, record.backend, cgroups_of(proxy_cgroup))
    return record.changed(existing=tuple(connection.cookie for connection in older))


def count_existing(record: Record, netns: Netns) -> int:
    """How many of the connections from before still live; all, where nobody can tell now."""
    try:
        return len(_living(record, netns))
    except (PyambientError, OSError):  # too many to list, or the pod is being freed
        return len(record.existing)


def end_existing(enrolled: Enrolled) -> int:
    """End those that still live; how many there were."""
    living = _living(enrolled.record, enrolled.netns)
    ended = end(enrolled.netns, socket.IPPROTO_TCP, living)
    if ended:
        _log.info("ended connections from before", pod=str(enrolled.record.pod), connections=ended)
    return ended


def _living(record: Record, netns: Netns) -> list[Socket]:
    if not record.existing:
        return []
    known = frozenset(record.existing)
    return [found for found in existing_connections(netns) if found.cookie in known]


def _of_apps(found: Collection[Socket], backend: str, proxies: frozenset[int]) -> list[Socket]:
    """Those that are not the proxy's: with `bpf` and `tc` no mark tells that."""
    trusts_mark = backend not in WITH_PROGRAMS

    def is_proxys(one: Socket) -> bool:
        return one.cgroup in proxies or (trusts_mark and one.mark & MARK_MASK == PROXY_MARK)

    return [one for one in found if not is_proxys(one)]


def end_older_queries(enrolled: Enrolled, proxy_cgroup: Path | None) -> None:
    """Let apps learn that their sockets to resolvers are of no use: nothing of them leaves the pod.

    Where the kernel does not do that they find out by themselves, when no answer comes.
    """
    record = enrolled.record
    if not any(step.kind == _DNS_GATE for step in record.steps):
        return
    outbound = record.options.outbound
    try:
        ended = existing.end_older_queries(enrolled.netns, outbound, record.addresses, proxy_cgroup)
    except (PyambientError, OSError) as error:
        _log.info("older UDP sockets to resolvers stay", pod=str(record.pod), why=str(error))
    else:
        if ended:
            _log.info("ended older UDP sockets to resolvers", pod=str(record.pod), sockets=ended)
