"""Port 15053 over TCP: a client's connection, several queries on it at once (RFC 7766).

What a client can make us hold is bounded: connections a pod, queries a connection (then it is read
no further), and answers it does not read (then its resolver is read no further).
"""

from __future__ import annotations

import socket
from typing import Final

import trio

from pyambient.dns import message as dns
from pyambient.engine.deadlines import Deadline
from pyambient.engine.relay import reset
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import DNS_IDLE_TIMEOUT, QUERY_TIMEOUT, RESOLVER_PORT
from pyambient.proxy.sockets import original_destination

from .scope import DnsScope
from .stream import MessageStream
from .upstream import Upstream

MAX_CONNECTIONS: Final = 128
MAX_PIPELINED: Final = 128
_UNSENT_MAX: Final = 64 << 10


class Connections:
    """The TCP connections of one pod's clients."""

    def __init__(self, scope: DnsScope) -> None:
        self.scope = scope
        self.live: set[ClientConnection] = set()
        self.draining = False

    def accepted(self, sock: socket.socket, peer: SocketAddress) -> None:
        """An app connected to a resolver; take its socket over. No reason to: it sees a reset."""
        scope = self.scope
        resolver = original_destination(sock, netfilter=scope.pod.netfilter)
        may_ask = scope.may_ask(peer, resolver.ip)
        if not may_ask or not self._is_captured(resolver) or not self._has_room():
            reset(sock)
            return
        scope.counters.connections += 1
        self.live.add(ClientConnection(self, sock, resolver))

    def _is_captured(self, resolver: SocketAddress) -> bool:
        """Whether it was on its way to a resolver, not to our own port."""
        if resolver.port != RESOLVER_PORT:
            self.scope.counters.without_resolver += 1
            return False
        return not self.scope.refusal(resolver.ip)

    def _has_room(self) -> bool:
        if len(self.live) < MAX_CONNECTIONS:
            return True
        self.scope.connection_refused(MAX_CONNECTIONS)
        return False

    def drain(self) -> None:
        """Close each connection as soon as its queries are answered."""
        self.draining = True
        for connection in list(self.live):
            connection.close_when_done()

    def close(self) -> None:
        for connection in list(self.live):
            connection.close()

    def __repr__(self) -> str:
        return f"<Connections, {len(self.live)} live>"


class ClientConnection:
    """One client's connection; it owns the stream to the client, and its upstream."""

    def __init__(
        self, connections: Connections, sock: socket.socket, resolver: SocketAddress
    ) -> None:
        self.scope = connections.scope
        self._connections = connections
        self._worker = self.scope.pod.worker
        self.upstream = Upstream(self.scope, resolver)
        self._queries: set[StreamQuery] = set()
        self._stream = MessageStream(self._worker.loop, sock, self)
        self._last_used = trio.current_time()
        self._idle = self._worker.dns_idle.start(self._check_use)

    def message(self, stream: MessageStream, message: bytes) -> None:
        self._last_used = trio.current_time()
        try:
            query = StreamQuery(self, dns.parse_query(message))
        except dns.MalformedQueryError as error:
            self.scope.counters.malformed += 1
            if error.answer:
                self.answer(error.answer)
            return
        if not self.scope.admit(query):
            return
        self._queries.add(query)
        if len(self._queries) >= MAX_PIPELINED:
            stream.pause()
        query.begin()

    def answer(self, message: bytes) -> None:
        self._stream.send(message)
        if self._stream.unsent > _UNSENT_MAX:
            self.upstream.pause()

    def is_over(self, query: StreamQuery) -> None:
        """A query was answered or given up."""
        self._queries.discard(query)
        if len(self._queries) < MAX_PIPELINED:
            self._stream.resume()
        self.close_when_done()

    def sent(self, _stream: MessageStream) -> None:
        self._last_used = trio.current_time()
        self.upstream.resume()
        self.close_when_done()

    def ended(self, stream: MessageStream) -> None:
        if stream.closed:
            self.close()
        else:
            self.close_when_done()

    def close_when_done(self) -> None:
        """Close if no more queries come and all that came are answered."""
        leaving = self._stream.half_closed or self._connections.draining
        if leaving and not self._queries and not self._stream.unsent:
            self.close()

    def _check_use(self) -> None:
        unused = trio.current_time() - self._last_used
        if not self._queries and unused >= DNS_IDLE_TIMEOUT:
            self.close()
        else:
            self._idle = self._worker.dns_idle.start(self._check_use)

    def close(self) -> None:
        """End the connection and what is asked on it."""
        if self not in self._connections.live:
            return
        self._connections.live.discard(self)
        self._idle.cancel()
        self._stream.close()
        self.upstream.close()
        for query in list(self._queries):
            query.drop()

    def crashed(self, error: BaseException) -> None:
        del error
        self.close()

    def __repr__(self) -> str:
        return f"<ClientConnection {len(self._queries)} queries, {self._stream!r}>"


class StreamQuery:
    """One query of a connection; `drop` it, or `begin` and have its answer sent."""

    __slots__ = ("_connection", "_deadline", "answering", "asked", "query", "upstream_id")

    def __init__(self, connection: ClientConnection, query: dns.Query) -> None:
        self._connection = connection
        self.query = query
        self.upstream_id = b""
        self.asked = 0
        self.answering = False
        self._deadline: Deadline | None = None

    def begin(self) -> None:
        self._restart_deadline()
        self._connection.upstream.ask(self)

    def _restart_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self._connection.scope.pod.worker.queries.start(self._expired)

    def answered(self, message: bytes) -> None:
        """The resolver's answer; the first of several if it is a transfer, over when none comes."""
        self._connection.answer(self.query.id + message[2:])
        if self.query.is_transfer:
            self.answering = True
            self._restart_deadline()
        else:
            self._connection.scope.counters.answered += 1
            self.drop()

    def _expired(self) -> None:
        self.failed(f"the resolver has not answered in {QUERY_TIMEOUT:g} s")

    def failed(self, reason: str) -> None:
        """Say so to the client; a transfer that has begun is just over."""
        scope = self._connection.scope
        if self.answering:
            scope.counters.answered += 1
        else:
            scope.failed(reason)
            self._connection.answer(dns.failure(self.query, dns.SERVFAIL, reason))
        self.drop()

    def drop(self) -> None:
        """End without an answer."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._connection.upstream.forget(self)
        self._connection.scope.share.release(self)
        self._connection.is_over(self)

    def __repr__(self) -> str:
        return f"<StreamQuery asked {self.asked} times>"
