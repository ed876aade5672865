"""A query that the proxy's own forwarder answers, so that no resolver has to be asked.

It has two questions. That is a format error (RFC 9619), so the forwarder says FORMERR and sends
nothing on; the question is the root's, which tells nobody anything.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from typing import Final

from pyambient.dns.framing import Frames, framed
from pyambient.intercept.socket_diag import is_connected
from pyambient.model.address import SocketAddress, from_sockaddr
from pyambient.model.numbers import RESOLVER_PORT
from pyambient.model.ports import Ports

_QUESTION: Final = b"\0\0\1\0\1"  # the root, A, IN
_TWO_QUESTIONS: Final = b"\0\0\0\2\0\0\0\0\0\0" + 2 * _QUESTION
_IS_RESPONSE: Final = 0x80
_LONGEST: Final = 512
_PATIENCE: Final = 0.5
_LOCALHOST: Final = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def redirected_to(target: SocketAddress, port: int) -> SocketAddress:
    """Where netfilter takes what goes to `target`, if the proxy listens on `port`."""
    return SocketAddress(_LOCALHOST[target.family], port)


def ask_by_udp(target: SocketAddress, _: Ports) -> str:
    """Ask the resolver at the target's address; why nobody has answered, empty if one has."""
    return _ask(target, socket.SOCK_DGRAM, _exchange_datagrams)


def ask_by_tcp(target: SocketAddress, ports: Ports) -> str:
    """The same over TCP; the other end of the connection must be a socket of this namespace."""
    exchange = functools.partial(_exchange_frames, ports)
    return _ask(target, socket.SOCK_STREAM, exchange)


_Exchange = Callable[[socket.socket, SocketAddress, bytes], str]


def _ask(target: SocketAddress, kind: socket.SocketKind, exchange: _Exchange) -> str:
    resolver = SocketAddress(target.ip, RESOLVER_PORT)
    query = os.urandom(2) + _TWO_QUESTIONS
    with socket.socket(resolver.family, kind) as client:
        client.settimeout(_PATIENCE)
        try:
            client.connect(resolver.sockaddr())
            return exchange(client, resolver, query)
        except TimeoutError:
            return f"nobody has answered a query to {resolver}"
        except OSError as error:
            return f"a query to {resolver}: {error.strerror}"


def _exchange_datagrams(client: socket.socket, _: SocketAddress, query: bytes) -> str:
    client.send(query)
    return _judge(query, client.recv(_LONGEST))


def _exchange_frames(
    ports: Ports, client: socket.socket, resolver: SocketAddress, query: bytes
) -> str:
    if not _is_captured(client, resolver, ports):
        return f"the connection to {resolver} is with somebody outside"
    client.sendall(framed(query))
    return _judge(query, _receive(client))


def _is_captured(client: socket.socket, resolver: SocketAddress, ports: Ports) -> bool:
    own = from_sockaddr(client.getsockname())
    ends = (resolver, redirected_to(resolver, ports.dns))
    return any(is_connected(end, own) for end in ends)


def _receive(client: socket.socket) -> bytes:
    frames = Frames()
    while (message := frames.next()) is None:
        received = client.recv(_LONGEST)
        if not received:
            return b""
        frames.feed(received)
    return message


def _judge(query: bytes, answer: bytes) -> str:
    if not answer:
        return "the connection was closed without an answer"
    if len(answer) < 3 or answer[:2] != query[:2] or not answer[2] & _IS_RESPONSE:
        return "what came back is no answer to the query"
    return ""
