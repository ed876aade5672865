"""rtnetlink in a pod's network namespace, by one socket for all that a task does there.

The socket is made between two setns calls, and stays in the namespace wherever the thread is. For
devices, addresses, routes and rules it is our own (`route_socket`); for the rest pyroute2's.
(`pyroute2.NetNS` would start a helper for that, which takes 10 ms.)
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Container, Iterator
from contextvars import ContextVar
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from pyambient.netns import Netns

from .route_socket import RouteSocket


class _Session:
    """A socket of each kind, made when it is first needed."""

    def __init__(self, netns: Netns) -> None:
        self.netns = netns
        self._kernel: Any = None
        self._routes: RouteSocket | None = None

    def routes(self) -> RouteSocket:
        if self._routes is None:
            self._routes = RouteSocket(self.netns)
        return self._routes

    def kernel(self) -> Any:
        if self._kernel is None:
            with self.netns.entered():
                self._kernel = IPRoute(groups=0)
        return self._kernel

    def close(self) -> None:
        if self._kernel is not None:
            self._kernel.close()
        if self._routes is not None:
            self._routes.close()

    def __repr__(self) -> str:
        return f"<rtnetlink of {self.netns.name}>"


_current: ContextVar[_Session | None] = ContextVar("rtnetlink session", default=None)


@contextlib.contextmanager
def session(netns: Netns) -> Iterator[_Session]:
    """Let all that speak to `netns` inside use one socket; sessions nest."""
    current = _current.get()
    if current is not None and current.netns is netns:
        yield current
        return
    opened = _Session(netns)
    token = _current.set(opened)
    try:
        yield opened
    finally:
        _current.reset(token)
        opened.close()


@contextlib.contextmanager
def routes(netns: Netns) -> Iterator[RouteSocket]:
    """A `RouteSocket` of the namespace: the session's, or one for this use alone."""
    with session(netns) as current:
        yield current.routes()


def change(netns: Netns, send: Callable[[RouteSocket], None], harmless: Container[int]) -> bool:
    """Change one thing; False if the kernel answers with one of the `harmless` errnos."""
    with routes(netns) as kernel:
        try:
            send(kernel)
        except OSError as error:
            if error.errno in harmless:
                return False
            raise
    return True


@contextlib.contextmanager
def routing(netns: Netns) -> Iterator[Any]:
    """An `IPRoute` of the namespace: the session's, or one for this use alone."""
    with session(netns) as current:
        yield current.kernel()


def request(netns: Netns, send: Callable[[Any], object], harmless: Container[int]) -> bool:
    """Send one request; False if the kernel answers with one of the `harmless` errnos."""
    with routing(netns) as kernel:
        try:
            send(kernel)
        except NetlinkError as error:
            if error.code in harmless:
                return False
            raise OSError(error.code, os.strerror(error.code)) from None
    return True


def device_names(netns: Netns) -> dict[int, str]:
    """{interface index: name}."""
    with netns.entered():
        return dict(socket.if_nameindex())
