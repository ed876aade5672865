"""The pods this proxy serves: started and stopped by the agent's word.

General theory of operation
---------------------------
Each pod is one trio task with a nursery of its own (`Pod.run`): cancelling it ends everything of
the pod and nothing of another. The agent's requests come over two channels: ZDS says add, remove
and retain; the details channel, which a foreign agent does not have, says how the pod is
intercepted, and drain. Listeners are bound before an add is acknowledged.

Nothing is accepted before the agent has named all of its pods: one that is served already would
take another that is yet to come for no workload of the mesh, and send to it in plain text. What
connects meanwhile waits.

Draining keeps the order that breaks no connection: stop accepting, GOAWAY on every tunnel so that
peers open nothing more, wait for the connections that live and for their last bytes to be with the
peers, then end what is left.
"""

from __future__ import annotations

from typing import Any

import trio

from pyambient.engine.accept import Listener
from pyambient.identity.certificate import IdentityError
from pyambient.mesh.authorize import authorize
from pyambient.model.backends import NETFILTER
from pyambient.model.workload import PodRef
from pyambient.netns import Netns
from pyambient.observe.logs import get_logger
from pyambient.zds.details import DnsCapture, Explain, PodDetails

from . import sockets
from .addresses import pod_addresses
from .dns.forwarder import Forwarder
from .dns.resolver import resolver_lookup
from .explain import explain
from .inbound import Inbound
from .neighbours import Neighbours
from .outbound import Outbound
from .plaintext import Plaintext
from .pool import Pool
from .worker import PodScope, Worker

_log = get_logger("pods")
# What an agent that knows no details gets, as in ztunnel: connections end this long after Del.
_FOREIGN_DRAIN = 5.0
_ISTIO_CNI_BACKEND = "iptables"


class Pod:
    """One pod being served."""

    def __init__(self, scope: PodScope, neighbours: Neighbours | None = None) -> None:
        self.scope = scope
        self._neighbours = neighbours
        self._pool = Pool(scope)
        self._inbound = Inbound(scope)
        self._listeners: list[Listener] = []
        self.forwarder: Forwarder | None = None
        self.draining = False

    def listen(self) -> None:
        """Bind the pod's listeners, or none of them; PyambientError if a port is taken.

        Connections are taken from `accept` on, DNS at once: it concerns no other pod.
        """
        worker, netns, ports = self.scope.worker, self.scope.netns, self.scope.details.ports
        handlers = (
            (ports.outbound, Outbound(self.scope, self._pool, self._neighbours).accepted),
            (ports.inbound, Plaintext(self.scope).accepted),
            (ports.hbone, self._inbound.accepted),
        )
        try:
            for port, accepted in handlers:
                sock = sockets.listener(netns, port, netfilter=self.scope.netfilter)
                self._listeners.append(Listener(worker.loop, sock, accepted, worker.shortages))
            self._forward_dns()
        except BaseException:
            self._stop_listening()
            raise
        self._be_reached()

    def accept(self) -> None:
        """Take connections from now on."""
        for listener in self._listeners:
            listener.start()

    def _be_reached(self) -> None:
        """Let the other pods know by which addresses."""
        if self._neighbours is not None:
            self._neighbours.note(self.scope)

    def _forward_dns(self) -> None:
        """Have a forwarder if the pod's DNS is captured, and none if it is not."""
        capture = self.scope.details.dns
        if capture is None:
            self._stop_forwarding()
        elif self.forwarder is None:
            self.forwarder = Forwarder(self.scope, resolver_lookup(self.scope, capture))
        else:
            self.forwarder.use(resolver_lookup(self.scope, capture))

    def _stop_forwarding(self) -> None:
        forwarder, self.forwarder = self.forwarder, None
        if forwarder is not None:
            forwarder.close()

    def describe(self, details: PodDetails) -> None:
        """How the pod is intercepted has changed."""
        before, self.scope.details = self.scope.details, details
        if (before.backend in NETFILTER) != self.scope.netfilter:
            for listener in self._listeners:
                listener.set_mark(sockets.listener_mark(netfilter=self.scope.netfilter))
            self._stop_forwarding()
        if (before.backend, before.dns) != (details.backend, details.dns):
            self._forward_dns()
        if self._listeners:
            self._be_reached()

    def _stop_listening(self) -> None:
        if self._neighbours is not None:
            self._neighbours.forget(self.scope)
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.close()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Keep the pod's certificate warm and its pool tidy, until cancelled."""
        async with trio.open_nursery() as nursery:
            self.scope.nursery = nursery
            task_status.started()
            nursery.start_soon(self._pool.release_idle)
            nursery.start_soon(self._warm_up)

    async def _warm_up(self) -> None:
        """Have the certificate before the first connection asks; a failure is asked again then."""
        try:
            await self.scope.certificate()
        except IdentityError as error:
            _log.warning("no certificate yet", pod=str(self.scope.pod), error=str(error))

    async def drain(self, timeout: float) -> int:  # noqa: ASYNC109 - the operator's number
        """Stop accepting, say GOAWAY, wait; the number of connections that were still there."""
        self.draining = True
        self._stop_listening()
        self._inbound.drain()
        self._pool.drain()
        forwarder = self.forwarder
        if forwarder is not None:
            forwarder.drain()
        with trio.move_on_after(timeout):
            await self.scope.wait_idle()
            await self._inbound.wait_over()
            await self._pool.wait_over()
            if forwarder is not None:
                await forwarder.wait_idle()
        return len(self.scope.live)

    def ask_policies_again(self) -> None:
        """The policies may have changed: end what they would not let in now."""
        own = self.scope.workload()
        if own is None:
            return
        policies = self.scope.worker.view.snapshot.policies_for(own)
        for connection in list(self.scope.live):
            facts = connection.facts
            if facts is not None and not authorize(policies, facts).allowed:
                connection.abort("connection closed due to policy change")

    def close(self, reason: str) -> None:
        """End every connection of the pod now."""
        self._stop_listening()
        self._stop_forwarding()
        for connection in list(self.scope.live):
            connection.abort(reason)
        self._inbound.close(reason)
        self._pool.close(reason)
        if self.scope.nursery is not None:
            self.scope.nursery.cancel_scope.cancel()

    async def settle(self, timeout: float) -> int:  # noqa: ASYNC109 - the operator's number
        """Wait until the present connections are over; the number of those that are not."""
        present = list(self.scope.live)
        with trio.move_on_after(timeout):
            await self.scope.wait_for(present)
        return sum(connection in self.scope.live for connection in present)

    def status(self) -> dict[str, Any]:
        """For people and programs, as JSON values; what is counted begins with this proxy.

        `refused` is by budget, `dns` is None where no DNS of the pod's comes here.
        """
        scope = self.scope
        certificate = scope.worker.certificates.current(scope.identity)
        return {
            "identity": str(scope.identity),
            "connections": len(scope.live),
            "draining": self.draining,
            "certificate_expires": certificate.not_after.isoformat() if certificate else None,
            "refused": dict(scope.budget.refused),
            "dns": self.forwarder.status() if self.forwarder is not None else None,
        }

    def __repr__(self) -> str:
        return f"<Pod {self.scope.pod}, {len(self.scope.live)} connections>"


class Pods:
    """All pods of this proxy: ZDS's PodHandler and the details channel's DetailsHandler."""

    def __init__(
        self, worker: Worker, nursery: trio.Nursery, neighbours: Neighbours | None = None
    ) -> None:
        """With `neighbours`, which is empty, pods reach one another without a tunnel."""
        self._worker = worker
        self._nursery = nursery
        self._neighbours = neighbours
        self._pods: dict[str, Pod] = {}
        self._details: dict[str, PodDetails] = {}
        self._all_named = False

    # zds_client.PodHandler

    async def add(self, pod: PodRef, netns: Netns) -> None:
        """Serve `pod` in `netns`, which is taken over; its listeners are bound on return."""
        serving = self._pods.get(pod.uid)
        if serving is not None:
            if serving.scope.netns.key == netns.key and not serving.draining:
                netns.close()
                return
            self._end(pod.uid, "the pod's network namespace was replaced")
        try:
            await self._nursery.start(self._serve, pod, netns)
        except BaseException:
            netns.close()
            raise

    async def _serve(
        self, ref: PodRef, netns: Netns, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """The task of one pod; what goes wrong in it ends this pod and no other."""
        details = self._details.get(ref.uid)
        if details is None:
            details = PodDetails(_ISTIO_CNI_BACKEND, pod_addresses(netns), dns=DnsCapture())
        scope = PodScope(self._worker, ref, netns, details)
        pod = Pod(scope, self._neighbours)
        pod.listen()
        self._pods[ref.uid] = pod
        self._worker.view.publish(scope.published())
        if self._all_named:
            pod.accept()
        _log.info("serving", pod=str(ref), netns=netns.name, backend=details.backend)
        try:
            await pod.run(task_status)
        except Exception as error:  # noqa: BLE001 - a bug met by one pod spares the others
            _log.error("internal error, the pod is given up", pod=str(ref), exc_info=error)
            self._end(ref.uid, "internal error")
        finally:
            scope.release_stock()
            netns.close()

    async def remove(self, uid: str) -> None:
        """Stop serving a pod: at once if it was drained, else after its connections had time."""
        self._details.pop(uid, None)
        pod = self._pods.get(uid)
        if pod is None:
            return
        if pod.draining:
            self._end(uid, "connection closed due to connection drain")
        else:
            self._nursery.start_soon(self._drain_and_end, uid, pod)

    async def _drain_and_end(self, uid: str, pod: Pod) -> None:
        await pod.drain(_FOREIGN_DRAIN)
        if self._pods.get(uid) is pod:
            self._end(uid, "connection closed due to connection drain")

    async def retain(self, uids: frozenset[str]) -> None:
        """The agent has named all its pods: stop the others, and let these accept."""
        for uid in set(self._pods) - uids:
            await self.remove(uid)
        if not self._all_named:
            self._all_named = True
            for pod in self._pods.values():
                pod.accept()

    def _end(self, uid: str, reason: str) -> None:
        pod = self._pods.pop(uid, None)
        if pod is None:
            return
        self._worker.view.withdraw(uid)
        pod.close(reason)
        _log.info("stopped serving", pod=str(pod.scope.pod), reason=reason)

    # details_client.DetailsHandler

    async def describe(self, uid: str, details: PodDetails) -> None:
        """Note how a pod is intercepted, before its add and whenever that changes."""
        self._details[uid] = details
        pod = self._pods.get(uid)
        if pod is not None:
            pod.describe(details)
            self._worker.view.publish(pod.scope.published())

    async def drain(self, uid: str, timeout: float) -> int:  # noqa: ASYNC109 - the operator's number
        """Drain a pod; the number of connections left when the time was up."""
        pod = self._pods.get(uid)
        return 0 if pod is None else await pod.drain(timeout)

    async def settle(self, uid: str, timeout: float) -> int:  # noqa: ASYNC109 - the operator's number
        """Let a pod's present connections end; the number left when the time was up."""
        pod = self._pods.get(uid)
        return 0 if pod is None else await pod.settle(timeout)

    async def status(self, uid: str) -> dict[str, Any]:
        pod = self._pods.get(uid)
        return {} if pod is None else pod.status()

    async def explain(self, question: Explain) -> dict[str, Any] | None:
        """What would happen to a connection of or to a pod."""
        pod = self._pods.get(question.uid)
        return None if pod is None else explain(pod.scope, question, self._neighbours).to_json()

    # the process

    def mesh_changed(self) -> None:
        for pod in self._pods.values():
            pod.ask_policies_again()

    async def drain_all(self, timeout: float) -> None:  # noqa: ASYNC109 - the operator's number
        """Drain every pod at once, as the process ends; the pods stay enrolled."""
        async with trio.open_nursery() as nursery:
            for pod in self._pods.values():
                nursery.start_soon(pod.drain, timeout)

    def __repr__(self) -> str:
        return f"<Pods serving {len(self._pods)}>"
