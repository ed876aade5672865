"""Port 15053 over UDP: each query goes on from a socket of its own, its answer comes back.

A query's client is known by where it came from, where it came to, its id and its question. The
same again is a client that has waited too long: it is sent on once more, from the same socket and
with the same id, as another would only double a forger's chances (RFC 5452 section 5).
"""

from __future__ import annotations

import os
import socket
from typing import Any, Final, NamedTuple

from pyambient.dns import message as dns
from pyambient.engine.deadlines import Deadline
from pyambient.engine.loop import IN
from pyambient.model.address import SocketAddress, from_sockaddr
from pyambient.model.numbers import QUERY_TIMEOUT, RESOLVER_PORT

from . import sockets
from .scope import DnsScope
from .sockets import Arrival

_DATAGRAMS_A_TURN: Final = 64
_ANSWERS_A_TURN: Final = 16
_REPEATS: Final = 3
# So many that do not match are no accident: a forger has found the port and guesses the id.
_MISMATCHES: Final = 64


class Client(NamedTuple):
    """Who asked over UDP, and which of its addresses it asked."""

    sockaddr: tuple[Any, ...]
    arrival: Arrival


class Datagrams:
    """The UDP socket of one pod's forwarder, and the queries that came by it."""

    def __init__(self, scope: DnsScope) -> None:
        """Bind the port; PyambientError if it is taken."""
        self.scope = scope
        self.pending: dict[object, DatagramQuery] = {}
        pod = scope.pod
        self._loop = pod.worker.loop
        self._view = pod.worker.buffers.plain_view
        self._sock = sockets.datagram_listener(
            pod.netns, pod.details.backend, pod.details.ports.dns
        )
        self._loop.watch(self._sock.fileno(), self._on_events, IN)

    def _on_events(self, _mask: int) -> None:
        for _ in range(_DATAGRAMS_A_TURN):
            try:
                count, ancillary, _, sockaddr = self._sock.recvmsg_into(
                    (self._view,), sockets.ANCILLARY_SIZE
                )
            except OSError:
                return
            arrived = sockets.arrival(ancillary)
            if arrived is not None:
                self._received(bytes(self._view[:count]), Client(sockaddr, arrived))

    def _received(self, message: bytes, client: Client) -> None:
        if not self.scope.may_ask(from_sockaddr(client.sockaddr), client.arrival.ip):
            return
        try:
            query = dns.parse_query(message)
        except dns.MalformedQueryError as error:
            self.scope.counters.malformed += 1
            if error.answer:
                self.send(error.answer, client)
            return
        key = (client, query.id, query.question)
        pending = self.pending.get(key)
        if pending is not None:
            pending.repeat()
        else:
            DatagramQuery(self, query, client, key).begin()

    def send(self, answer: bytes, client: Client) -> None:
        """Send to a client from the address that it asked; what cannot be sent is counted."""
        try:
            self._sock.sendmsg((answer,), client.arrival.answering, 0, client.sockaddr)
        except OSError:
            self.scope.counters.unsent += 1

    def suit(self, backend: str) -> None:
        """Answer from now on as this backend wants it."""
        sockets.mark_answers(self._sock, backend)

    def close(self) -> None:
        """Stop; queries in flight are their share's to drop."""
        if self._sock.fileno() >= 0:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()

    def __repr__(self) -> str:
        return f"<Datagrams fd {self._sock.fileno()}, {len(self.pending)} queries>"


class DatagramQuery:
    """One query in flight: its socket, its id there, its deadline."""

    __slots__ = (
        "_client",
        "_datagrams",
        "_deadline",
        "_id",
        "_key",
        "_mismatches",
        "_query",
        "_repeats",
        "_sock",
    )

    def __init__(self, datagrams: Datagrams, query: dns.Query, client: Client, key: object) -> None:
        self._datagrams = datagrams
        self._query = query
        self._client = client
        self._key = key
        self._id = b""
        self._sock: socket.socket | None = None
        self._deadline: Deadline | None = None
        self._mismatches = self._repeats = 0

    def begin(self) -> None:
        """Ask the resolver that the client meant, or say why not; over budget, say nothing."""
        scope = self._datagrams.scope
        if not scope.admit(self):
            return
        self._datagrams.pending[self._key] = self
        self._deadline = scope.pod.worker.queries.start(self._expired)
        peer, local_ip = from_sockaddr(self._client.sockaddr), self._client.arrival.ip
        resolver = scope.resolver(peer, local_ip)
        if resolver is None:
            self.drop()
        elif reason := scope.refusal(resolver):
            self._answer(dns.failure(self._query, dns.REFUSED, reason))
        else:
            self._ask(SocketAddress(resolver, RESOLVER_PORT))

    def _ask(self, resolver: SocketAddress) -> None:
        self._id = os.urandom(2)
        try:
            stock = self._datagrams.scope.pod.datagram_stock
            sock = self._sock = sockets.upstream(stock, resolver)
            sock.send(self._id + self._query.message[2:])
        except OSError as error:
            self._fail(f"cannot ask {resolver}: {error.strerror}")
            return
        self._datagrams.scope.pod.worker.loop.watch(sock.fileno(), self._on_events, IN)

    def repeat(self) -> None:
        """The client asks the same again."""
        self._datagrams.scope.counters.repeated += 1
        self._repeats += 1
        if self._sock is None or self._repeats > _REPEATS:
            return
        try:
            self._sock.send(self._id + self._query.message[2:])
        except OSError as error:
            self._fail(f"cannot ask the resolver: {error.strerror}")

    def _on_events(self, _mask: int) -> None:
        for _ in range(_ANSWERS_A_TURN):
            try:
                message = self._receive()
            except BlockingIOError:
                return
            except OSError as error:
                self._fail(f"the resolver cannot be reached: {error.strerror}")
                return
            if dns.is_answer(self._query, self._id, message):
                self._answered(message)
                return
            self._mismatched()
            if self._sock is None:
                return

    def _receive(self) -> bytes:
        assert self._sock is not None  # noqa: S101 - it is watched, so it is there
        view = self._datagrams.scope.pod.worker.buffers.plain_view
        return bytes(view[: self._sock.recv_into(view)])

    def _mismatched(self) -> None:
        self._datagrams.scope.counters.mismatched += 1
        self._mismatches += 1
        if self._mismatches >= _MISMATCHES:
            self._fail("too many answers did not match the query")

    def _answered(self, message: bytes) -> None:
        scope = self._datagrams.scope
        counters, most = scope.counters, scope.longest_answer(from_sockaddr(self._client.sockaddr))
        answer = dns.fitting(self._query, self._query.id + message[2:], most)
        counters.answered += 1
        counters.truncated += len(answer) < len(message)
        self._answer(answer)

    def _expired(self) -> None:
        self._fail(f"the resolver has not answered in {QUERY_TIMEOUT:g} s")

    def _fail(self, reason: str) -> None:
        self._datagrams.scope.failed(reason)
        self._answer(dns.failure(self._query, dns.SERVFAIL, reason))

    def _answer(self, answer: bytes) -> None:
        self.drop()
        self._datagrams.send(answer, self._client)

    def drop(self) -> None:
        """End without an answer."""
        datagrams = self._datagrams
        if self._deadline is not None:
            self._deadline.cancel()
        if self._sock is not None:
            datagrams.scope.pod.worker.loop.unwatch(self._sock.fileno())
            self._sock.close()
            self._sock = None
        datagrams.pending.pop(self._key, None)
        datagrams.scope.share.release(self)

    def crashed(self, error: BaseException) -> None:
        self._fail(f"internal error: {type(error).__name__}")

    def __repr__(self) -> str:
        sockaddr = self._client.sockaddr
        return f"<DatagramQuery of {from_sockaddr(sockaddr)} to {self._client.arrival.ip}>"
