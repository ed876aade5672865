"""The proxy of two pods in the test's own process, without interception.

The client pod's pool opens tunnels to the server pod's real 15008 listener; only the capture of
an app's connection is left out, so the test plays the 15001 listener.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from pyambient.engine.loop import Loop
from pyambient.engine.tunnel import Tunnel
from pyambient.identity.ca import EmbeddedAuthority
from pyambient.identity.store import CertificateStore
from pyambient.mesh.view import MeshView
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import HBONE_PORT
from pyambient.model.spiffe import SpiffeId
from pyambient.model.workload import PodRef
from pyambient.netns import Netns
from pyambient.observe.accesslog import AccessLog
from pyambient.proxy.budgets import Limits
from pyambient.proxy.pods import Pods
from pyambient.proxy.pool import Pool, PoolKey, Waiter
from pyambient.proxy.worker import PodScope, Worker
from pyambient.zds.details import PodDetails
from tests.bed import Bed, BedPod

TRUST_DOMAIN = "cluster.local"


class ProxyRig:
    """A worker that serves the bed's pods, and a pool of the first one."""

    def __init__(self, worker: Worker, nursery: trio.Nursery, lines: list[str]) -> None:
        self.worker = worker
        self.nursery = nursery
        self.lines = lines
        self.pods = Pods(worker, nursery)
        self.scopes: list[PodScope] = []

    async def serve(self, pod: BedPod) -> None:
        addresses = tuple(ip for ip in (pod.ipv4, pod.ipv6) if ip)
        await self.pods.describe(pod.name, PodDetails("bpf", addresses))
        await self.pods.add(self.ref(pod), Netns.open(pod.name))

    @staticmethod
    def ref(pod: BedPod) -> PodRef:
        return PodRef(pod.name, pod.name, "default", pod.name)

    def pool(self, pod: BedPod) -> Pool:
        """A pool in `pod`'s network namespace, whose tasks are the rig's."""
        details = PodDetails("bpf", ())
        scope = PodScope(self.worker, self.ref(pod), pod.netns, details, self.nursery)
        self.scopes.append(scope)
        return Pool(scope)

    def key(self, client: BedPod, server: BedPod, *, expected: str = "") -> PoolKey:
        """What a connection from one pod to the other asks for, by IPv4."""
        assert client.ipv4 is not None
        assert server.ipv4 is not None
        return PoolKey(
            SpiffeId(TRUST_DOMAIN, "default", client.name),
            frozenset((SpiffeId(TRUST_DOMAIN, "default", expected or server.name),)),
            client.ipv4,
            SocketAddress(server.ipv4, HBONE_PORT),
        )


class Asked:
    """One waiter, and what it was told."""

    def __init__(self, pool: Pool, key: PoolKey) -> None:
        self.told = trio.Event()
        self.tunnel: Tunnel | None = None
        self.peer: SpiffeId | None = None
        self.failure = ""
        pool.request(key, Waiter(self._ready, self._failed))

    def _ready(self, tunnel: Tunnel, peer: SpiffeId) -> None:
        self.tunnel, self.peer = tunnel, peer
        self.told.set()

    def _failed(self, reason: str) -> None:
        self.failure = reason
        self.told.set()


def proxied(
    bed: Bed,
    directory: Path,
    test: Callable[[ProxyRig], Awaitable[None]],
    limits: Limits | None = None,
) -> list[str]:
    """Run `test(rig)` on a loop with a worker; the access log's lines."""
    del bed
    loop = Loop()
    lines: list[str] = []

    async def main() -> None:
        authority = EmbeddedAuthority.open(directory, TRUST_DOMAIN)
        certificates = CertificateStore(authority)
        log = AccessLog("plain", lines.append)
        view = MeshView(TRUST_DOMAIN)
        worker = Worker(loop, view, certificates, log, TRUST_DOMAIN, limits=limits)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run_deadlines)
            nursery.start_soon(certificates.run)
            rig = ProxyRig(worker, nursery, lines)
            await rig.pods.retain(frozenset())
            with trio.fail_after(30):
                await test(rig)
            await rig.pods.retain(frozenset())
            for scope in rig.scopes:
                scope.release_stock()
            nursery.cancel_scope.cancel()

    loop.run(main)
    return lines


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; the rig's own deadline bounds it."""
    while not condition():  # noqa: ASYNC110 - the condition has no event of its own
        await trio.sleep(0.005)
