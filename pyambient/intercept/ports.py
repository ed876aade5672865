"""Choosing the ports on which the proxy will listen in a pod, by trying what it will do.

General theory of operation
---------------------------
Apps had the pod first. A server may listen on one of the proxy's ports there, a connection may have
one as its own (`ip_local_port_range` can be anything), or still wait with it in TIME_WAIT. Then
another port stands for it in this pod. The kernel alone knows all that is in the way, so a socket
is bound.

A port is free if it can be bound in two ways. Without SO_REUSEPORT: somebody who is root, as the
proxy is, and shares the port would get a part of what is meant for the proxy. And as the proxy
binds it, which meets connections in TIME_WAIT that were an app's, and passes those that were a
proxy's. Where a proxy has been, or still is and drains, the second way alone counts.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Iterator
from typing import Final

from pyambient.errors import PyambientError
from pyambient.model.numbers import DNS_PORT, RESERVED_PORTS
from pyambient.model.ports import WELL_KNOWN, Ports
from pyambient.netns import Netns

_FIRST_OTHER: Final = 100  # 15101 stands for 15001
_OTHERS: Final = 32
_KINDS: Final = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}


def choose_ports(netns: Netns, present: Ports = WELL_KNOWN, *, served: bool = False) -> Ports:
    """Ports that are free in the pod: those that are `present` as far as they are.

    `served`: proxies have been in the pod before, and may still be. PyambientError if one has no
    port left.
    """
    chosen: list[int] = []
    with netns.entered():
        for well_known, before in zip(RESERVED_PORTS, present, strict=True):
            candidates = _candidates(well_known, before, chosen)
            free = (port for port in candidates if _is_free(netns, well_known, port, served=served))
            port = next(free, None)
            if port is None:
                raise _all_taken(netns, well_known)
            chosen.append(port)
    return Ports(*chosen)


def _candidates(well_known: int, present: int, chosen: Collection[int]) -> Iterator[int]:
    first = well_known + _FIRST_OTHER
    for port in dict.fromkeys((present, well_known, *range(first, first + _OTHERS))):
        if port not in chosen:
            yield port


def _is_free(netns: Netns, well_known: int, port: int, *, served: bool) -> bool:
    """Whether the proxy can have the port, in the namespace that this thread is in."""
    kinds = tuple(_KINDS) if well_known == DNS_PORT else (socket.SOCK_STREAM,)
    for kind in kinds:
        for shared in (True,) if served else (True, False):
            try:
                _bind(kind, port, shared=shared)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise PyambientError(
                        f"{_KINDS[kind]} port {port} cannot be bound in {netns.name}:"
                        f" {error.strerror}",
                        f"see 'ss -{_KINDS[kind][0]}anp' there",
                    ) from None
                return False
    return True


def _bind(kind: int, port: int, *, shared: bool) -> None:
    """Bind both families; where the kernel has no IPv6, IPv4."""
    try:
        probe, host = socket.socket(socket.AF_INET6, kind), "::"
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        probe, host = socket.socket(socket.AF_INET, kind), ""
    with probe:
        if host:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if shared:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        elif kind == socket.SOCK_STREAM:
            # What a proxy accepted has this set and may wait in TIME_WAIT: it is not in the way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _all_taken(netns: Netns, well_known: int) -> PyambientError:
    first = well_known + _FIRST_OTHER
    return PyambientError(
        f"port {well_known} is taken in {netns.name}, and so is each from {first} to"
        f" {first + _OTHERS - 1}",
        f"stop what 'ss -anp sport = :{well_known}' shows there",
    )
