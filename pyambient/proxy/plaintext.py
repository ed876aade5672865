"""Port 15006: plain TCP towards the pod, captured on its way in.

The app sees the client's own IP. Only destinations that are addresses of this pod are served: an
app with NAT rules of its own could otherwise make the proxy, which the node trusts more, connect
on its behalf. Policies see no identity here, so a STRICT policy refuses the connection.
"""

from __future__ import annotations

import socket

from pyambient.engine.relay import reset
from pyambient.mesh import inbound as decisions
from pyambient.model.address import SocketAddress

from . import sockets
from .plain import PLAIN_DESCRIPTORS, PlainConnection
from .records import inbound_record
from .worker import PodScope


class Plaintext:
    """The 15006 listener's decisions."""

    def __init__(self, scope: PodScope) -> None:
        self._scope = scope

    def accepted(self, sock: socket.socket, peer: SocketAddress) -> None:
        """Somebody outside connected to an app of the pod; take the socket over."""
        scope = self._scope
        if not scope.budget.may_take(PLAIN_DESCRIPTORS):
            reset(sock)
            return
        destination = sockets.original_destination(sock, netfilter=scope.netfilter)
        decision = decisions.decide_plaintext(
            destination,
            scope.addresses,
            scope.workload(),
            scope.worker.view.snapshot,
            peer,
            scope.loops,
        )
        if isinstance(decision, decisions.Reject):
            scope.worker.access_log.failed(peer, destination, "inbound", decision.reason)
            reset(sock)
            return
        record = inbound_record(scope, peer, destination, decision.service)
        target = decision.target
        connection = PlainConnection(scope, sock, record, decision.facts)
        connection.begin(lambda: sockets.towards_app(scope.stock, peer, target), target)

    def __repr__(self) -> str:
        return f"<Plaintext of {self._scope.pod}>"
