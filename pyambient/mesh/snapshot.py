"""The mesh at one moment: immutable, and every look-up of the data path is one dictionary access.

Addresses are canonical text everywhere (`model.address`), so that no look-up parses one. The
endpoints of a service are the workloads that name it; the policies of a workload are the global
ones, those of its namespace and those it names.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

from pyambient.model.policy import Policy, Scope
from pyambient.model.workload import (
    GatewayAddress,
    NamespacedHostname,
    NetworkCidr,
    Service,
    Workload,
)

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")
# A node's connections go to few places; this many questions take about 4 MB.
_MEMO_MAX = 8192
_Selection = tuple[tuple[Policy, ...], tuple[str, ...]]


class Snapshot:
    """Workloads, services and policies, indexed.

    Several workloads may have one address: look-ups give the one that comes first in `workloads`.
    `also_known_as` gives workloads further uids. `warnings` says in one line each what the indexes
    had to decide or could not find. `memo` is for pure functions of the snapshot that keep
    results; it dies with the snapshot, and `remember` bounds what comes from outside.
    """

    def __init__(
        self,
        workloads: Iterable[Workload] = (),
        services: Iterable[Service] = (),
        policies: Iterable[Policy] = (),
        also_known_as: Mapping[str, Workload] | None = None,
    ) -> None:
        self.workloads = tuple(workloads)
        self.services = tuple(services)
        self.policies = tuple(policies)
        self.memo: dict[Hashable, Any] = {}
        warnings: list[str] = []
        self._by_uid = {w.uid: w for w in self.workloads} | dict(also_known_as or {})
        self._by_address = _addresses(self.workloads, warnings)
        self._by_hostname = {(w.namespace, w.hostname): w for w in self.workloads if w.hostname}
        self._endpoints = _grouped((key, w) for w in self.workloads for key in w.services)
        self._service_by_key = {s.key: s for s in self.services}
        self._by_vip = _grouped(((v.network, v.ip), s) for s in self.services for v in s.vips)
        self._by_cidr = _grouped((v.network, (v, s)) for s in self.services for v in s.cidr_vips)
        self._by_service_host = _grouped((s.hostname.lower(), s) for s in self.services)
        self._policies = _PolicyIndex(self.policies)
        self._selections = self._select_all(warnings)
        self.warnings = tuple(warnings)

    def remember(self, question: Hashable, answer: _V) -> _V:
        """Keep `answer` in `memo`, which is emptied when it has grown large; the answer."""
        if len(self.memo) >= _MEMO_MAX:
            self.memo.clear()
        self.memo[question] = answer
        return answer

    def workload_by_address(self, network: str, ip: str) -> Workload | None:
        return self._by_address.get((network, ip))

    def workload_by_uid(self, uid: str) -> Workload | None:
        return self._by_uid.get(uid)

    def own_workload(self, enrolled: Workload) -> Workload:
        """The entry that stands for an enrolled pod; the pod as enrolled if there is none."""
        return self._by_uid.get(enrolled.uid, enrolled)

    def service(self, key: str) -> Service | None:
        """The service `<namespace>/<hostname>`."""
        return self._service_by_key.get(key)

    def service_by_address(self, network: str, ip: str, namespace: str) -> Service | None:
        """The best service with this VIP that a client in `namespace` may see.

        One in the client's namespace is best, then a canonical one, then the first. Ranges are
        looked at when no single VIP matches: own namespace, longest prefix, canonical.
        """
        exact = self._by_vip.get((network, ip))
        if exact is not None:
            best = _best(exact, namespace)
            if best is not None:
                return best
        ranges = self._by_cidr.get(network)
        return _best_range(ranges, ip, namespace) if ranges else None

    def service_by_hostname(self, hostname: str, namespace: str) -> Service | None:
        """The best service of this name that a client in `namespace` may see."""
        return _best(self._by_service_host.get(hostname.lower(), ()), namespace)

    def endpoints(self, service: Service) -> tuple[Workload, ...]:
        """All workloads behind a service, healthy or not."""
        return self._endpoints.get(service.key, ())

    def services_of(self, workload: Workload) -> tuple[Service, ...]:
        """The services that a workload stands behind and that are known here."""
        found = map(self._service_by_key.get, workload.services)
        return tuple(service for service in found if service is not None)

    def gateway(self, gateway: GatewayAddress, namespace: str) -> Service | Workload | None:
        """What a waypoint's destination names, for a client in `namespace`."""
        where = gateway.destination
        if isinstance(where, NamespacedHostname):
            named = self._service_by_key.get(str(where))
            return named or self._by_hostname.get((where.namespace, where.hostname))
        service = self.service_by_address(where.network, where.ip, namespace)
        return service or self.workload_by_address(where.network, where.ip)

    def gateway_instances(self, gateway: GatewayAddress, namespace: str) -> tuple[Workload, ...]:
        """The workloads that make up a waypoint."""
        found = self.gateway(gateway, namespace)
        if isinstance(found, Service):
            return self.endpoints(found)
        return () if found is None else (found,)

    def policies_for(self, workload: Workload) -> tuple[Policy, ...]:
        """The policies at the door of a workload: global, its namespace's, those it names."""
        return self._selection(workload)[0]

    def unknown_policies(self, workload: Workload) -> tuple[str, ...]:
        """Policies that a workload names and no one has defined: skipped, as ztunnel does."""
        return self._selection(workload)[1]

    def _selection(self, workload: Workload) -> _Selection:
        found = self._selections.get((workload.namespace, workload.policies))
        return found or self._policies.select(workload)

    def _select_all(self, warnings: list[str]) -> dict[tuple[str, tuple[str, ...]], _Selection]:
        selections: dict[tuple[str, tuple[str, ...]], _Selection] = {}
        for workload in self.workloads:
            key = (workload.namespace, workload.policies)
            selections[key] = selection = selections.get(key) or self._policies.select(workload)
            warnings += [
                f"workload {workload} names policy {name!r}, which is not defined: it is skipped"
                for name in selection[1]
            ]
        return selections

    def __repr__(self) -> str:
        return (
            f"<Snapshot {len(self.workloads)} workloads, {len(self.services)} services, "
            f"{len(self.policies)} policies>"
        )


class _PolicyIndex:
    """Policies by scope and by name, to select a workload's."""

    def __init__(self, policies: tuple[Policy, ...]) -> None:
        self._by_key = {policy.key: policy for policy in policies}
        self._global = tuple(p for p in policies if p.scope is Scope.GLOBAL)
        self._by_namespace = _grouped(
            (p.namespace, p) for p in policies if p.scope is Scope.NAMESPACE
        )

    def select(self, workload: Workload) -> _Selection:
        """What applies to a workload, each policy once, and the names that are unknown."""
        chosen = [*self._global, *self._by_namespace.get(workload.namespace, ())]
        chosen += [self._by_key[name] for name in workload.policies if name in self._by_key]
        unknown = tuple(name for name in workload.policies if name not in self._by_key)
        return tuple({policy.key: policy for policy in chosen}.values()), unknown


def _grouped(pairs: Iterable[tuple[_K, _V]]) -> dict[_K, tuple[_V, ...]]:
    groups: dict[_K, list[_V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return {key: tuple(values) for key, values in groups.items()}


def _addresses(
    workloads: tuple[Workload, ...], warnings: list[str]
) -> dict[tuple[str, str], Workload]:
    """Who has an address; host-network workloads share the node's and are not found by it."""
    holders = _grouped(
        ((w.network, ip), w) for w in workloads if not w.host_network for ip in w.addresses
    )
    for (_, ip), sharing in holders.items():
        if len(sharing) > 1:
            names = ", ".join(f"{w} ({w.uid})" for w in sharing)
            warnings.append(
                f"address {ip} belongs to {names}: look-ups by address give {sharing[0]}"
            )
    return {address: sharing[0] for address, sharing in holders.items()}


def _best(services: tuple[Service, ...], namespace: str) -> Service | None:
    visible = [s for s in services if s.visible_to(namespace)]
    if len(visible) < 2:
        return visible[0] if visible else None
    return max(visible, key=lambda s: (s.namespace == namespace, s.canonical))


def _best_range(
    ranges: tuple[tuple[NetworkCidr, Service], ...], ip: str, namespace: str
) -> Service | None:
    address = ipaddress.ip_address(ip)
    matching = [
        ((s.namespace == namespace, vip.cidr.prefixlen, s.canonical), s)
        for vip, s in ranges
        if s.visible_to(namespace) and address in vip.cidr
    ]
    return max(matching, key=lambda ranked: ranked[0])[1] if matching else None
