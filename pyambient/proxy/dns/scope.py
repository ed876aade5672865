"""What the UDP and the TCP half of a pod's forwarder share."""

from __future__ import annotations

from dataclasses import dataclass

from pyambient.dns import message as dns
from pyambient.intercept.original_dns import ResolverLookup
from pyambient.model.address import SocketAddress
from pyambient.observe.logs import get_logger
from pyambient.observe.seldom import Seldom
from pyambient.proxy.worker import PodScope

from .budget import InFlight, Share
from .resolver import own_addresses, refusal

_log = get_logger("dns")


@dataclass
class Counters:
    """What became of a pod's queries; the share counts those it dropped."""

    queries: int = 0
    answered: int = 0
    failed: int = 0
    refused: int = 0
    malformed: int = 0
    from_strangers: int = 0
    without_resolver: int = 0
    repeated: int = 0
    mismatched: int = 0
    truncated: int = 0
    unsent: int = 0
    connections: int = 0
    connections_refused: int = 0


class DnsScope:
    """One pod's forwarder, as its queries see it."""

    def __init__(self, pod: PodScope, lookup: ResolverLookup) -> None:
        self.pod = pod
        self.lookup = lookup
        self._is_own = own_addresses(pod)
        self.share: Share = pod.worker.query_budget.share()
        self.counters = Counters()
        self._over_budget = Seldom(_log, "DNS queries dropped, too many are in flight")
        self._refused = Seldom(_log, "DNS query refused")
        self._failed = Seldom(_log, "DNS query failed")
        self._full = Seldom(_log, "DNS connection refused, the pod has too many")

    def may_ask(self, peer: SocketAddress, local_ip: str) -> bool:
        """Whether the pod itself asks, or somebody behind it; counted if not.

        `local_ip` is where the query came to: none of the pod's if its devices turned it round.
        """
        if self._is_own(peer.ip) or (self.pod.turned_round and not self._is_own(local_ip)):
            return True
        self.counters.from_strangers += 1
        return False

    def longest_answer(self, client: SocketAddress) -> int:
        """What a client can get in one datagram, in bytes.

        The answer leaves by lo, which takes any; on its way to somebody behind the pod nobody would
        make fragments of a packet of IPv6, and who is behind it does not always show.
        """
        turned = self.pod.turned_round and client.is_ipv6
        return dns.ANY_LINK_UDP_SIZE if turned else dns.LARGEST

    def admit(self, query: InFlight) -> bool:
        """Count a query in; False, counted and now and then logged, if there are too many."""
        if self.share.admit(query):
            self.counters.queries += 1
            return True
        self._over_budget.warn(pod=str(self.pod.pod), dropped=self.share.dropped)
        return False

    def resolver(self, peer: SocketAddress, local_ip: str) -> str | None:
        """The IP of the resolver that was meant; None, and counted, if nobody knows it.

        Whoever sent to the proxy's own port meant none.
        """
        try:
            found = self.lookup.resolver(peer, local_ip)
        except OSError as error:
            self.failed(f"cannot find out which resolver was meant: {error.strerror}")
            return None
        self.counters.without_resolver += found is None
        return found

    def failed(self, reason: str) -> None:
        """Count a query that got no answer of a resolver; now and then it is logged."""
        self.counters.failed += 1
        self._failed.warn(pod=str(self.pod.pod), reason=reason)

    def connection_refused(self, limit: int) -> None:
        """Count a connection beyond the pod's `limit`; now and then it is logged."""
        self.counters.connections_refused += 1
        self._full.warn(pod=str(self.pod.pod), limit=limit)

    def refusal(self, resolver: str) -> str:
        """Why `resolver` is not asked, counted and now and then logged; empty if it is."""
        reason = refusal(resolver, self.pod.addresses)
        if reason:
            self.counters.refused += 1
            self._refused.warn(pod=str(self.pod.pod), reason=reason)
        return reason

    def close(self) -> None:
        """Drop what is in flight."""
        self.share.close()
        self.lookup.close()

    def __repr__(self) -> str:
        return f"<DnsScope of {self.pod.pod}, {self.share!r}>"
