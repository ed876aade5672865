"""The proxy's part of `pyambient explain`: the mesh's rules, asked with what this pod has."""

from __future__ import annotations

from collections.abc import Iterator

from pyambient.mesh import explain as mesh
from pyambient.mesh.route import Tunnel
from pyambient.model.address import SocketAddress
from pyambient.model.explained import End, Explanation, Finding, Outcome, Ruled
from pyambient.zds.details import Explain

from .neighbours import Neighbours
from .worker import PodScope

# No rule of the mesh asks for the port that a client connects from.
_ANY_PORT = 0


def explain(
    scope: PodScope, question: Explain, neighbours: Neighbours | None = None
) -> Explanation:
    """What would happen to a connection that the pod's listeners get."""
    own = scope.workload()
    if own is None:
        return Explanation.of(_not_enrolled())
    snapshot = scope.worker.view.snapshot
    if question.source:
        source = SocketAddress(question.source, _ANY_PORT)
        explained = mesh.explain_inbound(
            snapshot, own, scope.addresses, source, question.to, scope.loops
        )
    else:

        def nearby(route: Tunnel) -> str:
            return "" if neighbours is None else _neighbour(scope, neighbours, route)

        explained = mesh.explain_outbound(snapshot, own, question.to, nearby, scope.loops)
    return explained if explained.outcome is not Outcome.TUNNELLED else _proven(scope, explained)


def _neighbour(scope: PodScope, neighbours: Neighbours, route: Tunnel) -> str:
    """Which pod of this proxy the route leads to, if an app without a source of its own asks."""
    for ip in scope.addresses:
        reached = neighbours.reached(scope, SocketAddress(ip, _ANY_PORT), route)
        if reached is not None:
            return str(reached.pod)
    return ""


def _not_enrolled() -> Iterator[Ruled]:
    found = "the pod is not enrolled any more"
    yield Finding("own workload", False, found), End(Outcome.REFUSED, found)


def _proven(scope: PodScope, explained: Explanation) -> Explanation:
    """The same, after what a tunnel needs first of all."""
    found = f"the pod has none yet as {scope.identity}; a tunnel waits for it"
    certificate = scope.worker.certificates.current(scope.identity)
    if certificate is not None:
        found = f"the pod proves to be {scope.identity} until {certificate.not_after:%F %T} UTC"
    mine = Finding("certificate", certificate is not None, found)
    return Explanation((mine, *explained.findings), explained.outcome, explained.summary)
