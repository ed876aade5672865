"""ztunnel's local mesh file as a table: every key, what it may hold and where its value goes.

Keys, tags and required keys are ztunnel's (its `LocalConfig` and what that holds). Where ztunnel's
file mode leaves an identity incomplete, a default stands in, and what it silently drops (an unknown
key of a match, an address range it cannot parse) is an error here.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from pyambient.model.address import canonical_ip
from pyambient.model.policy import (
    Action,
    Match,
    MatchKind,
    Network,
    Policy,
    Scope,
    ServiceAccountMatch,
    StringMatch,
)
from pyambient.model.spiffe import SpiffeId
from pyambient.model.workload import (
    ApplicationTunnel,
    GatewayAddress,
    HealthStatus,
    IpFamilies,
    LoadBalancerMode,
    Locality,
    NamespacedHostname,
    NetworkAddress,
    NetworkCidr,
    RoutingScope,
    Service,
    TunnelledProtocol,
    TunnelProtocol,
    Visibility,
    WeightedWaypoint,
    Workload,
)

from .yamlreader import (
    Field,
    Reader,
    Spot,
    boolean,
    choice,
    list_of,
    map_of,
    matching,
    number,
    number_key,
    parsed,
    record,
    tagged,
    text,
)

_E = TypeVar("_E", bound=enum.Enum)


@dataclass(frozen=True, slots=True)
class LocalConfig:
    """What a mesh file says."""

    workloads: tuple[Workload, ...] = ()
    services: tuple[Service, ...] = ()
    policies: tuple[Policy, ...] = ()

    def __str__(self) -> str:
        return (
            f"{len(self.workloads)} workloads, {len(self.services)} services, "
            f"{len(self.policies)} policies"
        )


def mesh_file(trust_domain: str) -> Reader[LocalConfig]:
    """The reader of a whole file; `trust_domain` is that of workloads that name none."""
    workload = _workload(trust_domain)
    return record(
        LocalConfig,
        {
            "workloads": Field("workloads", list_of(workload, lambda w: f"uid {w.uid!r}")),
            "services": Field("services", list_of(_SERVICE, lambda s: f"service {s.key!r}")),
            "policies": Field("policies", list_of(_POLICY, lambda p: f"policy {p.key!r}")),
        },
    )


def _word(kind: type[_E]) -> Reader[_E]:
    return choice({str(member.value): member for member in kind})


def _cidr(value: str) -> Network:
    """A range; one of IPv4-mapped addresses as IPv4, which is how addresses are compared."""
    network = ipaddress.ip_network(value, strict=False)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is not None and network.prefixlen >= 96:
        return ipaddress.ip_network((mapped, network.prefixlen - 96))
    return network


def _network_address(value: str) -> NetworkAddress:
    network, slash, ip = value.partition("/")
    if not slash:
        raise ValueError(f"{value!r} names no network")
    return NetworkAddress(network, canonical_ip(ip))


def _destination(value: str) -> NetworkAddress | NamespacedHostname:
    try:
        return _network_address(value)
    except ValueError:
        return NamespacedHostname(*_pair(value))


def _pair(value: str) -> tuple[str, str]:
    first, _, second = value.partition("/")
    if not (first and second) or "/" in second:
        raise ValueError(f"{value!r} is not two names with a slash between them")
    return first, second


def _policy_name(value: str) -> str:
    """`<namespace>/<name>`; global policies of ztunnel's have no namespace."""
    if value.count("/") != 1 or value.endswith("/"):
        raise ValueError(f"{value!r} is not <namespace>/<name>")
    return value


_NAME = matching(r"[A-Za-z0-9._-]+", "a name of letters, digits, '.', '_' and '-'")
_DOMAIN = matching(
    r"[a-z0-9._-]+", "a trust domain of lower-case letters, digits, '.', '_' and '-'"
)
_IP = parsed(canonical_ip, "write an IPv4 or IPv6 address")
_CIDR = parsed(_cidr, "write a range such as 10.0.0.0/8")
_VIP = parsed(_network_address, "write <network>/<IP>, for the one network without a name /<IP>")
_SPIFFE = parsed(SpiffeId.parse, "write spiffe://<trust domain>/ns/<namespace>/sa/<account>")
_PORT = number(1, 65535)
# A named port is 0 here: each endpoint says which port it means by it.
_PORTS = map_of(number_key(1, 65535), number(0, 65535))
_SERVICE_KEY = parsed(lambda value: "/".join(_pair(value)), "write <namespace>/<hostname>")
_HOSTNAME = matching(r"[^\s/]+", "a host name")
_WEIGHT = number(0, (1 << 32) - 1)

_GATEWAY = record(
    GatewayAddress,
    {
        "destination": Field(
            "destination",
            parsed(_destination, "write <network>/<IP> or <namespace>/<hostname>"),
            required=True,
        ),
        "hboneMtlsPort": Field("hbone_port", _PORT, required=True),
    },
)

_LOCALITY = record(
    Locality, {key: Field(key, text, required=True) for key in ("region", "zone", "subzone")}
)

_APPLICATION_TUNNEL = record(
    ApplicationTunnel,
    {
        "protocol": Field("protocol", _word(TunnelledProtocol), required=True),
        "port": Field("port", _PORT),
    },
)


def _build_workload(**values: Any) -> Workload:
    """A workload; without a uid it gets the one that Istio would give a pod of its name."""
    name = values.setdefault("name", "")
    if "uid" not in values:
        known = name or next(iter(values["addresses"]), "") or values.get("hostname", "")
        if not known:
            raise ValueError("the workload has neither uid, name, address nor hostname")
        values["uid"] = f"Kubernetes//Pod/{values['namespace']}/{known}"
    return Workload(**values)


def _workload(trust_domain: str) -> Reader[Workload]:
    return record(
        _build_workload,
        {
            "workloadIps": Field("addresses", list_of(_IP), required=True),
            "namespace": Field("namespace", _NAME, required=True),
            "services": Field("services", map_of(_SERVICE_KEY, _PORTS), required=True),
            "uid": Field("uid", matching(r".+", "a name")),
            "name": Field("name", text),
            "serviceAccount": Field("service_account", _NAME, default="default"),
            "trustDomain": Field("trust_domain", _DOMAIN, default=trust_domain),
            "network": Field("network", text),
            "protocol": Field("protocol", _word(TunnelProtocol)),
            "networkMode": Field("host_network", choice({"Standard": False, "HostNetwork": True})),
            "workloadName": Field("workload_name", text),
            "workloadType": Field("workload_type", text),
            "canonicalName": Field("canonical_name", text),
            "canonicalRevision": Field("canonical_revision", text),
            "hostname": Field("hostname", text),
            "node": Field("node", text),
            # ztunnel fetches certificates ahead by it; here enrolment does.
            "nativeTunnel": Field("", boolean),
            "applicationTunnel": Field("application_tunnel", _APPLICATION_TUNNEL),
            "authorizationPolicies": Field(
                "policies", list_of(parsed(_policy_name, "write <namespace>/<name>"))
            ),
            "status": Field("status", _word(HealthStatus)),
            "clusterId": Field("cluster_id", text),
            "locality": Field("locality", _LOCALITY),
            "waypoint": Field("waypoint", _GATEWAY),
            # What is behind a network gateway is refused, with or without one.
            "networkGateway": Field("", _GATEWAY),
            "capacity": Field("capacity", _WEIGHT),
        },
    )


_LOAD_BALANCER: Reader[dict[str, Any]] = record(
    dict,
    {
        "routingPreferences": Field(
            "routing_preferences", list_of(_word(RoutingScope)), required=True
        ),
        "mode": Field("balancing", _word(LoadBalancerMode), required=True),
        "healthPolicy": Field(
            "allow_unhealthy", choice({"OnlyHealthy": False, "AllowAll": True}), required=True
        ),
    },
)


_CIDR_VIP = record(
    NetworkCidr,
    {
        "network": Field("network", text, required=True),
        "cidr": Field("cidr", _CIDR, required=True),
    },
)

_WEIGHTED_WAYPOINT = record(
    WeightedWaypoint,
    {
        "destination": Field("gateway", _GATEWAY, required=True),
        "weight": Field("weight", _WEIGHT, required=True),
    },
)


def _build_service(load_balancer: Mapping[str, Any] | None = None, **values: Any) -> Service:
    return Service(**values, **(load_balancer or {}))


_SERVICE = record(
    _build_service,
    {
        "name": Field("name", text, required=True),
        "namespace": Field("namespace", _NAME, required=True),
        "hostname": Field("hostname", _HOSTNAME, required=True),
        "vips": Field("vips", list_of(_VIP), required=True),
        "ports": Field("ports", _PORTS, required=True),
        "cidrVips": Field("cidr_vips", list_of(_CIDR_VIP)),
        "subjectAltNames": Field("subject_alt_names", list_of(_SPIFFE)),
        "waypoint": Field("waypoint", _GATEWAY),
        "weightedWaypoints": Field("weighted_waypoints", list_of(_WEIGHTED_WAYPOINT)),
        "loadBalancer": Field("load_balancer", _LOAD_BALANCER),
        "ipFamilies": Field("ip_families", _word(IpFamilies)),
        "canonical": Field("canonical", boolean),
        "visibility": Field("visibility", _word(Visibility)),
    },
)


def _match_text(spot: Spot) -> str:
    """The text behind a tag; without any, `!Presence []` is what says "anything"."""
    if not isinstance(spot.node, yaml.ScalarNode) or not spot.node.value:
        raise spot.error(
            f"{spot.node.tag} stands without text", "write text, or !Presence [] for any"
        )
    return str(spot.node.value)


def _no_text(spot: Spot) -> str:
    if spot.node.value:
        raise spot.error("!Presence stands with a value", "write !Presence []")
    return ""


def _string_match(kind: MatchKind) -> Reader[StringMatch]:
    read = _no_text if kind is MatchKind.PRESENCE else _match_text
    return lambda spot: StringMatch(kind, read(spot))


_STRINGS = list_of(
    tagged(
        {f"!{kind.value}": _string_match(kind) for kind in MatchKind},
        "write !Exact, !Prefix or !Suffix and a text, or !Presence []",
    )
)

_SERVICE_ACCOUNT = record(
    ServiceAccountMatch,
    {
        "namespace": Field("namespace", _NAME, required=True),
        "serviceAccount": Field("service_account", _NAME, required=True),
    },
)


def _and_not(key: str, argument: str, values: Reader[Any]) -> dict[str, Field[Any]]:
    """A key of a match and the one that excludes."""
    negative = f"not{key[0].upper()}{key[1:]}"
    return {key: Field(argument, values), negative: Field(f"not_{argument}", values)}


_MATCH = record(
    Match,
    {
        **_and_not("namespaces", "namespaces", _STRINGS),
        **_and_not("principals", "principals", _STRINGS),
        **_and_not("serviceAccounts", "service_accounts", list_of(_SERVICE_ACCOUNT)),
        **_and_not("sourceIps", "source_ips", list_of(_CIDR)),
        **_and_not("destinationIps", "destination_ips", list_of(_CIDR)),
        **_and_not("destinationPorts", "destination_ports", list_of(_PORT)),
    },
)

_POLICY = record(
    Policy,
    {
        "name": Field("name", _HOSTNAME, required=True),
        "namespace": Field("namespace", matching(r"[A-Za-z0-9._-]*", "a namespace"), required=True),
        "scope": Field("scope", _word(Scope), required=True),
        "action": Field("action", _word(Action), required=True),
        "rules": Field("rules", list_of(list_of(list_of(_MATCH))), required=True),
        "dryRun": Field("dry_run", boolean),
    },
)
