"""Whom a pod's query is passed on to, and who may ask at all.

Port 15053 is open on every address of the pod, so the network could ask, too: only the pod itself
is answered, and whoever is behind it if its devices brought the query here. What it asked must be
somewhere else: a resolver on loopback or on an address of the pod's own is never captured, and
asking it for the pod could bring the query back here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection
from pathlib import Path

from pyambient.intercept.original_dns import (
    ResolverLookup,
    addressed_resolvers,
    bpf_resolvers,
    conntrack_resolvers,
)
from pyambient.model.address import is_loopback
from pyambient.proxy.addresses import pod_addresses
from pyambient.proxy.worker import PodScope
from pyambient.zds.details import DnsCapture


def resolver_lookup(pod: PodScope, capture: DnsCapture) -> ResolverLookup:
    """What knows which resolver an app of the pod meant; PyambientError if that is not there."""
    if pod.netfilter:
        return conntrack_resolvers(pod.netns, pod.details.ports.dns)
    if pod.turned_round:
        return addressed_resolvers(pod.netns, own_addresses(pod))
    return bpf_resolvers(Path(capture.bpffs), capture.netns_cookie)


def own_addresses(pod: PodScope) -> Callable[[str], bool]:
    """Tells which addresses are the pod's, those included that mean nothing outside of it."""
    link_local = frozenset(ip.partition("%")[0] for ip in pod_addresses(pod.netns) if "%" in ip)
    return lambda ip: may_ask(ip, pod.addresses) or ip.partition("%")[0] in link_local


def may_ask(peer_ip: str, own: Collection[str]) -> bool:
    """Whether a query from `peer_ip` is one of the pod that has the addresses `own`."""
    return peer_ip in own or is_loopback(peer_ip)


def refusal(resolver: str, own: Collection[str]) -> str:
    """Why nothing is sent to `resolver` for the pod that has the addresses `own`; empty if it is.

    An address that nobody can answer from (0.0.0.0, which means this host, multicast) is refused
    as well.
    """
    ip = ipaddress.ip_address(resolver)
    if resolver in own or ip.is_loopback or ip.is_unspecified:
        return f"{resolver} is in the pod itself, where no query is captured"
    if ip.is_multicast or resolver == "255.255.255.255":
        return f"{resolver} is no resolver's address"
    return ""
