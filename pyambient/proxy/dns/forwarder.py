"""The DNS forwarder of one pod.

General theory of operation
---------------------------
Interception brings the pod's queries, UDP and TCP, to port 15053. The forwarder finds out which
resolver the app had meant and asks just that one, from the pod's network namespace, as the app
would have: the pod's own resolv.conf, search domains and network policies stay what decides. It
changes nothing in a message but the id, keeps no answers, and answers by itself only if nobody
else does: FORMERR, REFUSED, and SERVFAIL after 5 s.

It is made of callbacks on the engine's loop, as the byte path is, not of trio tasks: a query is
two datagrams in and two out, and a task with its nursery and cancel scope would cost more than
they do. Each query over UDP has a socket of its own, for its port (`sockets`). What that costs in
descriptors the budget bounds (`budget`): 4,096 queries for all pods of the process.

Nothing here trusts a sender. Queries must come from the pod itself (`resolver`), an answer must
come from the resolver's address to the query's own port with the query's own id and question
(`pyambient.dns.message`), and what is malformed is answered with FORMERR or not at all.

Draining: TCP is accepted no more, and connections are closed when their queries are answered. UDP
knows no connection that could go elsewhere, so it is served until the pod is closed; `wait_idle`
waits for what was in flight when the drain began.
"""

from __future__ import annotations

import dataclasses

from pyambient.engine.accept import Listener
from pyambient.intercept.original_dns import ResolverLookup
from pyambient.proxy import sockets
from pyambient.proxy.worker import PodScope

from .scope import Counters, DnsScope
from .tcp import Connections
from .udp import Datagrams


class Forwarder:
    """Port 15053 of one pod."""

    def __init__(self, pod: PodScope, lookup: ResolverLookup) -> None:
        """Take over `lookup`, and bind the port; PyambientError if it is taken."""
        self._scope = DnsScope(pod, lookup)
        self._connections = Connections(self._scope)
        self._datagrams: Datagrams | None = None
        self._listener: Listener | None = None
        try:
            self._bind(pod)
        except BaseException:
            self.close()
            raise

    def _bind(self, pod: PodScope) -> None:
        worker = pod.worker
        self._datagrams = Datagrams(self._scope)
        sock = sockets.listener(pod.netns, pod.details.ports.dns, netfilter=pod.netfilter)
        self._listener = Listener(worker.loop, sock, self._connections.accepted, worker.shortages)
        self._listener.start()

    @property
    def counters(self) -> Counters:
        return self._scope.counters

    @property
    def dropped(self) -> int:
        """How many queries were over the budget."""
        return self._scope.share.dropped

    def status(self) -> dict[str, int]:
        """What became of the queries so far."""
        return {**dataclasses.asdict(self.counters), "dropped": self.dropped}

    def use(self, lookup: ResolverLookup) -> None:
        """Take over another `lookup`: the pod's interception has changed."""
        before, self._scope.lookup = self._scope.lookup, lookup
        before.close()
        if self._datagrams is not None:
            self._datagrams.suit(self._scope.pod.details.backend)

    def drain(self) -> None:
        """Accept no more connections; close those that are there when they are answered."""
        if self._listener is not None:
            self._listener.close()
        self._connections.drain()

    async def wait_idle(self) -> None:
        """Wait until the queries that are in flight now are over."""
        await self._scope.share.wait_over()

    def close(self) -> None:
        """End all of it now."""
        if self._listener is not None:
            self._listener.close()
        self._connections.close()
        if self._datagrams is not None:
            self._datagrams.close()
        self._scope.close()

    def __repr__(self) -> str:
        return f"<Forwarder of {self._scope.pod.pod}, {self._scope.share!r}>"
