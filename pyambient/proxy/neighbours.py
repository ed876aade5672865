"""The pods of this proxy by address: which of them a connection may reach without a tunnel.

General theory of operation
---------------------------
With `--same-node direct` a connection between two pods of one proxy needs no wire, so it needs no
TLS. What a tunnel proves is known here by other means, or there is no short way:

* the client's identity is that of the network namespace whose listener took the connection;
* the server's is that of the namespace that will be connected in, and must be an expected one;
* a network would lead from the one address to the other. Namespaces reuse addresses, so both must
  be such as one pod alone has: the client's its own, the server's the pod that the mesh means.

Whatever is not so goes by HBONE, which fails where it must.
"""

from __future__ import annotations

from pyambient.mesh.route import Tunnel
from pyambient.model.address import SocketAddress

from .worker import PodScope

_Place = tuple[str, str]


class Neighbours:
    """The pods that take connections now."""

    def __init__(self) -> None:
        self._by_place: dict[_Place, list[PodScope]] = {}
        self._places: dict[PodScope, tuple[_Place, ...]] = {}

    def note(self, scope: PodScope) -> None:
        """A pod takes connections, or its addresses have changed."""
        self.forget(scope)
        places = self._places[scope] = tuple((scope.details.network, ip) for ip in scope.addresses)
        for place in places:
            self._by_place.setdefault(place, []).append(scope)

    def forget(self, scope: PodScope) -> None:
        """A pod takes no more connections; one that is not known is no error."""
        for place in self._places.pop(scope, ()):
            holders = self._by_place[place]
            holders.remove(scope)
            if not holders:
                del self._by_place[place]

    def reached(self, source: PodScope, peer: SocketAddress, route: Tunnel) -> PodScope | None:
        """The pod that a connection of `source` reaches without a tunnel, if it does.

        `peer` is the address that the client's app has, in whatever way it came by it.
        """
        target = route.target
        if target is None or peer.family != target.family:
            return None
        if self._only(source.details.network, peer.ip) is not source:
            return None
        found = self._only(route.workload.network, target.ip)
        return found if found is not None and found.workload() is route.workload else None

    def _only(self, network: str, ip: str) -> PodScope | None:
        """The one pod that has the address."""
        holders = self._by_place.get((network, ip), ())
        return holders[0] if len(holders) == 1 else None

    def __repr__(self) -> str:
        return f"<Neighbours: {len(self._places)} pods>"
