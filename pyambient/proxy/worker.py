"""What all pods of one proxy process share, and what belongs to one pod."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from pyambient.engine.deadlines import Deadlines
from pyambient.engine.loop import Loop
from pyambient.engine.pacing import Pacer
from pyambient.engine.splicing import PipePool, Splicer
from pyambient.engine.tls import SharedBuffers
from pyambient.hbone import LocalSettings, OutputPool
from pyambient.identity.certificate import Certificate, IdentityError
from pyambient.identity.context import Contexts
from pyambient.identity.store import CertificateStore
from pyambient.mesh.view import MeshView
from pyambient.model.backends import NETFILTER
from pyambient.model.numbers import (
    ANSWER_TIMEOUT,
    CONNECT_TIMEOUT,
    DNS_IDLE_TIMEOUT,
    OWN_WORKLOAD_TIMEOUT,
    QUERY_TIMEOUT,
)
from pyambient.model.policy import ConnectionFacts
from pyambient.model.spiffe import SpiffeId
from pyambient.model.workload import PodRef, TunnelProtocol, Workload
from pyambient.netns import Netns
from pyambient.observe.accesslog import AccessLog, ConnectionRecord
from pyambient.zds.details import PodDetails

from .budgets import Budgets, Limits, PodBudget
from .dns.budget import Budget
from .sockets import Stock

_SHORTAGE_PAUSE = 0.1
_HTTP2 = LocalSettings()


class Worker:
    """One proxy process: its loop, its buffers, its view of the mesh, its certificates."""

    def __init__(
        self,
        loop: Loop,
        view: MeshView,
        certificates: CertificateStore,
        access_log: AccessLog,
        trust_domain: str,
        http2: LocalSettings = _HTTP2,
        limits: Limits | None = None,
    ) -> None:
        """`http2` are the settings of every tunnel, `limits` by default those of the process."""
        self.loop = loop
        self.view = view
        self.certificates = certificates
        self.access_log = access_log
        self.trust_domain = trust_domain
        self.http2 = http2
        self.contexts = Contexts()
        self.buffers = SharedBuffers()
        self.outputs = OutputPool()
        self.pipes = PipePool()
        self.handshakes = Pacer(loop)
        self.budgets = Budgets(limits)
        self.connects = Deadlines(CONNECT_TIMEOUT)
        self.answers = Deadlines(ANSWER_TIMEOUT)
        self.shortages = Deadlines(_SHORTAGE_PAUSE)
        self.queries = Deadlines(QUERY_TIMEOUT)
        self.dns_idle = Deadlines(DNS_IDLE_TIMEOUT)
        self.query_budget = Budget(self.budgets.limits.queries)

    async def run_deadlines(self) -> None:
        """Expire what is overdue, forever."""
        async with trio.open_nursery() as nursery:
            for deadlines in (
                self.connects,
                self.answers,
                self.shortages,
                self.queries,
                self.dns_idle,
            ):
                nursery.start_soon(deadlines.run)

    def __repr__(self) -> str:
        return f"<Worker of trust domain {self.trust_domain}, {self.loop!r}>"


class Live(Protocol):
    """A proxied connection that can be given up.

    `facts` are what the pod's policies were asked with when it was let in; None on the way out.
    """

    @property
    def facts(self) -> ConnectionFacts | None: ...

    @property
    def finished(self) -> bool: ...

    def abort(self, error: str) -> None: ...


def baggage(workload: Workload | None) -> str:
    """W3C baggage that describes a workload, in ztunnel's order; empty parts are left out."""
    if workload is None:
        return ""
    parts = (
        ("k8s.cluster.name", workload.cluster_id),
        ("k8s.namespace.name", workload.namespace),
        (f"k8s.{workload.workload_type}.name", workload.workload_name),
        ("service.name", workload.canonical_name),
        ("service.version", workload.canonical_revision),
    )
    return ",".join(f"{key}={value}" for key, value in parts if value)


@dataclass(eq=False)
class PodScope:
    """What the listeners of one pod share."""

    worker: Worker
    pod: PodRef
    netns: Netns
    details: PodDetails
    nursery: trio.Nursery | None = None
    live: dict[Live, int] = field(default_factory=dict)
    identity: SpiffeId = field(init=False)
    stock: Stock = field(init=False)
    budget: PodBudget = field(init=False)
    splicer: Splicer = field(init=False)
    datagram_stock: Stock = field(init=False)
    _described: tuple[Workload | None, str] = (None, "")
    idle: trio.Event = field(default_factory=trio.Event)
    _waiting: set[trio.Event] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.identity = self.pod.identity(self.worker.trust_domain)
        self.stock = Stock(self.netns)
        self.budget = self.worker.budgets.pod(str(self.pod))
        self.splicer = Splicer(self.worker.pipes, self.budget)
        self.datagram_stock = Stock(self.netns, socket.SOCK_DGRAM)

    @property
    def netfilter(self) -> bool:
        return self.details.backend in NETFILTER

    @property
    def loops(self) -> tuple[int, ...]:
        """The proxy's own ports in the pod: what is sent there comes straight back."""
        return self.details.ports.loops

    @property
    def turned_round(self) -> bool:
        """Whether the pod's devices bring its traffic here, that of others behind it as well."""
        return self.details.backend == "tc"

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.details.addresses

    def workload(self) -> Workload | None:
        """The pod as the mesh sees it: what the mesh file says of it, else its enrolment."""
        return self.worker.view.snapshot.workload_by_uid(self.pod.uid)

    def release_stock(self) -> None:
        """Give back the sockets that were made ahead."""
        self.stock.close()
        self.datagram_stock.close()

    def baggage_of(self, workload: Workload | None) -> str:
        """`baggage`, kept for the workload that was asked for last: mostly the pod's own."""
        if workload is not self._described[0]:
            self._described = (workload, baggage(workload))
        return self._described[1]

    def published(self) -> Workload:
        """The workload that the enrolment itself publishes."""
        pod = self.pod
        return Workload(
            uid=pod.uid,
            name=pod.name,
            namespace=pod.namespace,
            service_account=pod.service_account,
            trust_domain=self.worker.trust_domain,
            addresses=self.details.addresses,
            protocol=TunnelProtocol.HBONE,
            network=self.details.network,
            workload_name=pod.name,
            canonical_name=pod.name,
        )

    async def certificate(self) -> Certificate:
        """The pod's certificate, waiting for it if need be; IdentityError after 5 s."""
        current = self.worker.certificates.current(self.identity)
        if current is not None:
            return current
        with trio.move_on_after(OWN_WORKLOAD_TIMEOUT):
            return await self.worker.certificates.get(self.identity)
        raise IdentityError(
            f"no certificate for {self.identity} in {OWN_WORKLOAD_TIMEOUT:g} s",
            "check the authority's log",
        )

    def start_soon(self, task: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run a task of this pod; it ends with the pod."""
        assert self.nursery is not None  # noqa: S101 - nothing is accepted before Pod.run
        self.nursery.start_soon(task, *args)

    def track(self, connection: Live, descriptors: int) -> None:
        """Count a proxied connection and what it takes; `finish` it when it is over."""
        self.live[connection] = descriptors
        self.budget.take(descriptors)

    def finish(self, connection: Live, record: ConnectionRecord) -> None:
        """A proxied connection is over: forget it, and write its line."""
        self.budget.give(self.live.pop(connection, 0))
        if not self.live:
            self.idle.set()
        for event in self._waiting:
            event.set()
        self.worker.access_log.complete(record)

    async def wait_idle(self) -> None:
        """Wait until no proxied connection is left."""
        while self.live:
            self.idle = trio.Event()
            await self.idle.wait()

    async def wait_for(self, connections: Collection[Live]) -> None:
        """Wait until all of these proxied connections are over, whatever others there are."""
        while any(connection in self.live for connection in connections):
            one_is_over = trio.Event()
            self._waiting.add(one_is_over)
            try:
                await one_is_over.wait()
            finally:
                self._waiting.remove(one_is_over)

    def __repr__(self) -> str:
        return f"<PodScope {self.pod}, {len(self.live)} connections>"
