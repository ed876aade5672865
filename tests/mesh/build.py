"""Small meshes for the tables: every builder fills in what a test does not care about."""

from __future__ import annotations

from typing import Any

from pyambient.model.address import SocketAddress
from pyambient.model.policy import Action, Match, Policy, Scope
from pyambient.model.spiffe import SpiffeId
from pyambient.model.workload import (
    GatewayAddress,
    NamespacedHostname,
    NetworkAddress,
    Service,
    TunnelProtocol,
    Workload,
)

CLIENT_IP = "10.0.0.1"
PEER = SocketAddress(CLIENT_IP, 40000)


def workload(name: str, *addresses: str, **fields: Any) -> Workload:
    """An HBONE workload of namespace default, with a service account of its own name."""
    given = {
        "uid": f"Kubernetes//Pod/default/{name}",
        "namespace": "default",
        "service_account": name,
        "trust_domain": "cluster.local",
        "protocol": TunnelProtocol.HBONE,
    }
    return Workload(name=name, addresses=addresses, **(given | fields))


def service(name: str, *vips: str, **fields: Any) -> Service:
    """A service of namespace default, from port 80 to 8080."""
    given = {
        "namespace": "default",
        "hostname": f"{name}.default.svc.cluster.local",
        "ports": {80: 8080},
        "vips": tuple(NetworkAddress("", vip) for vip in vips),
    }
    return Service(name=name, **(given | fields))


def behind(*services: Service, ports: dict[int, int] | None = None) -> dict[str, dict[int, int]]:
    """The `services` field of a workload that stands behind these."""
    return {s.key: ports or {} for s in services}


def policy(name: str, *matches: Match, **fields: Any) -> Policy:
    """An ALLOW policy of namespace default, with one rule of one clause."""
    given = {
        "namespace": "default",
        "scope": Scope.NAMESPACE,
        "action": Action.ALLOW,
        "rules": (((*matches,),),),
    }
    return Policy(name=name, **(given | fields))


def gateway(destination: str, port: int = 15008) -> GatewayAddress:
    """A waypoint by `<namespace>/<hostname>`, or by `/<IP>`."""
    first, _, second = destination.partition("/")
    if first:
        return GatewayAddress(NamespacedHostname(first, second), port)
    return GatewayAddress(NetworkAddress("", second), port)


def spiffe(account: str, namespace: str = "default", domain: str = "cluster.local") -> SpiffeId:
    return SpiffeId(domain, namespace, account)


def first(_total: int) -> int:
    """The choice that always takes the first."""
    return 0
