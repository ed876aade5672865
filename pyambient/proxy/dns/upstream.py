"""A client's TCP connection, continued to the resolver: one there for each client's.

It is opened for the first query, and again when the resolver has closed it in between, which a
resolver may do at any time (RFC 7766 section 6.2.3). A query that was on a connection which ended
is asked once more (section 6.2.4).
"""

from __future__ import annotations

import os
import socket
from typing import Protocol

from pyambient.dns.message import Query, is_answer
from pyambient.engine.accept import Dial, connect
from pyambient.model.address import SocketAddress
from pyambient.proxy.sockets import outbound

from .scope import DnsScope
from .stream import MessageStream


class Asked(Protocol):
    """A query of a client's connection."""

    query: Query
    upstream_id: bytes
    # How often it was sent, and whether an answer came: of a transfer's many, the first.
    asked: int
    answering: bool

    def answered(self, message: bytes) -> None: ...

    def failed(self, reason: str) -> None: ...


class Upstream:
    """The connection to the resolver for one client connection, and what is asked on it."""

    def __init__(self, scope: DnsScope, resolver: SocketAddress) -> None:
        self._scope = scope
        self._resolver = resolver
        self._queries: dict[bytes, Asked] = {}
        self._sock: socket.socket | None = None
        self._dial: Dial | None = None
        self._stream: MessageStream | None = None

    def ask(self, query: Asked) -> None:
        """Send a query, as soon as there is a connection; its `answered` or `failed` is called."""
        query.upstream_id = self._unused_id()
        self._queries[query.upstream_id] = query
        if self._stream is not None:
            self._send(self._stream, query)
        elif self._dial is None:
            self._connect()

    def _unused_id(self) -> bytes:
        while (candidate := os.urandom(2)) in self._queries:
            pass
        return candidate

    @staticmethod
    def _send(stream: MessageStream, query: Asked) -> None:
        query.asked += 1
        stream.send(query.upstream_id + query.query.message[2:])

    def _connect(self) -> None:
        pod = self._scope.pod
        try:
            sock = self._sock = outbound(pod.stock, self._resolver.family)
            if connect(sock, self._resolver):
                self._connected(None)
            else:
                self._dial = Dial(pod.worker.loop, sock, pod.worker.connects, self._connected)
        except OSError as error:
            self._failed(error)

    def _connected(self, error: OSError | None) -> None:
        self._dial = None
        if error is not None:
            self._failed(error)
            return
        assert self._sock is not None  # noqa: S101 - _connect() made it
        sock, self._sock = self._sock, None
        stream = self._stream = MessageStream(self._scope.pod.worker.loop, sock, self)
        for query in list(self._queries.values()):
            self._send(stream, query)

    def _failed(self, error: OSError) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        for query in list(self._queries.values()):
            query.failed(f"cannot ask {self._resolver} over TCP: {error.strerror}")

    def message(self, _stream: MessageStream, message: bytes) -> None:
        query = self._queries.get(message[:2])
        # The later messages of a transfer may leave the question out (RFC 5936 section 2.2.1).
        if query is not None and (
            query.answering or is_answer(query.query, query.upstream_id, message)
        ):
            query.answered(message)
        else:
            self._scope.counters.mismatched += 1

    def ended(self, stream: MessageStream) -> None:
        stream.close()
        self._stream = None
        for query in list(self._queries.values()):
            if query.answering or query.asked > 1:
                query.failed("the resolver has closed the connection")
        if self._queries:
            self._connect()

    def sent(self, stream: MessageStream) -> None:
        pass

    def forget(self, query: Asked) -> None:
        """Nobody waits for this query's answer any more."""
        if self._queries.get(query.upstream_id) is query:
            del self._queries[query.upstream_id]

    def pause(self) -> None:
        """Take no more answers until `resume`: the client does not read those it has."""
        if self._stream is not None:
            self._stream.pause()

    def resume(self) -> None:
        if self._stream is not None:
            self._stream.resume()

    def close(self) -> None:
        if self._dial is not None:
            self._dial.cancel()
            self._dial = None
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def crashed(self, error: BaseException) -> None:
        self.close()
        for query in list(self._queries.values()):
            query.failed(f"internal error: {type(error).__name__}")

    def __repr__(self) -> str:
        return f"<Upstream to {self._resolver}, {len(self._queries)} queries>"
