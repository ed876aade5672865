"""Workloads, services and pods as immutable values (istio.workload's fields, in Python names)."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from .spiffe import SpiffeId

_NOTHING: Mapping[str, Mapping[int, int]] = MappingProxyType({})


class TunnelProtocol(enum.Enum):
    """How a workload wants to be reached."""

    NONE = "TCP"
    HBONE = "HBONE"


class HealthStatus(enum.Enum):
    HEALTHY = "Healthy"
    UNHEALTHY = "Unhealthy"


@dataclass(frozen=True, slots=True)
class PodRef:
    """Which pod an enrolment is for: what ZDS carries about it."""

    uid: str
    name: str
    namespace: str
    service_account: str

    def identity(self, trust_domain: str) -> SpiffeId:
        return SpiffeId(trust_domain, self.namespace, self.service_account)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class NamespacedHostname:
    """A service's key: `<namespace>/<hostname>`."""

    namespace: str
    hostname: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.hostname}"


@dataclass(frozen=True, slots=True)
class NetworkAddress:
    """An IP in a network; the network is "" where there is just one."""

    network: str
    ip: str

    def __str__(self) -> str:
        return f"{self.network}/{self.ip}"


@dataclass(frozen=True, slots=True)
class NetworkCidr:
    """A range of addresses in a network."""

    network: str
    cidr: ipaddress.IPv4Network | ipaddress.IPv6Network

    def __str__(self) -> str:
        return f"{self.network}/{self.cidr}"


@dataclass(frozen=True, slots=True)
class GatewayAddress:
    """A waypoint, and the port on which it speaks HBONE."""

    destination: NetworkAddress | NamespacedHostname
    hbone_port: int

    def __str__(self) -> str:
        return str(self.destination)


@dataclass(frozen=True, slots=True)
class WeightedWaypoint:
    """One of several waypoints of a service; its share of connections goes by `weight`."""

    gateway: GatewayAddress
    weight: int


@dataclass(frozen=True, slots=True)
class Locality:
    """Where a workload runs; "" where that is not known."""

    region: str = ""
    zone: str = ""
    subzone: str = ""


class TunnelledProtocol(enum.Enum):
    """What an application that takes tunnelled traffic itself wants in front of the bytes."""

    NONE = "NONE"
    PROXY = "PROXY"


@dataclass(frozen=True, slots=True)
class ApplicationTunnel:
    """The application's own way of taking tunnelled traffic; port 0 keeps the requested one."""

    protocol: TunnelledProtocol
    port: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """One instance that can send and receive traffic.

    `services` maps a service to {service port: target port}. `policies` names the
    workload-selector policies as `<namespace>/<name>`.
    """

    uid: str
    name: str
    namespace: str
    service_account: str
    trust_domain: str
    addresses: tuple[str, ...] = ()
    protocol: TunnelProtocol = TunnelProtocol.NONE
    network: str = ""
    hostname: str = ""
    node: str = ""
    locality: Locality = Locality()
    cluster_id: str = "Kubernetes"
    workload_name: str = ""
    workload_type: str = "pod"
    canonical_name: str = ""
    canonical_revision: str = "latest"
    status: HealthStatus = HealthStatus.HEALTHY
    capacity: int = 1
    host_network: bool = False
    policies: tuple[str, ...] = ()
    services: Mapping[str, Mapping[int, int]] = field(
        default_factory=lambda: _NOTHING, compare=False
    )
    waypoint: GatewayAddress | None = None
    application_tunnel: ApplicationTunnel | None = None

    @property
    def identity(self) -> SpiffeId:
        return SpiffeId(self.trust_domain, self.namespace, self.service_account)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class LoadBalancerMode(enum.Enum):
    """Which endpoints a service's preferences leave.

    STANDARD all, STRICT those that match every preference, FAILOVER those that match most of
    them in order, PASSTHROUGH none: the connection goes where it was going.
    """

    STANDARD = "Standard"
    STRICT = "Strict"
    FAILOVER = "Failover"
    PASSTHROUGH = "Passthrough"


class RoutingScope(enum.Enum):
    """What a client and an endpoint can have in common."""

    NETWORK = "Network"
    REGION = "Region"
    ZONE = "Zone"
    SUBZONE = "Subzone"
    NODE = "Node"
    CLUSTER = "Cluster"


class IpFamilies(enum.Enum):
    """Which addresses of its endpoints a service uses."""

    AUTOMATIC = "Automatic"
    DUAL = "Dual"
    IPV4 = "IPv4"
    IPV6 = "IPv6"

    def accepts(self, ip: str) -> bool:
        if self is IpFamilies.IPV4:
            return ":" not in ip
        return self is not IpFamilies.IPV6 or ":" in ip


class Visibility(enum.Enum):
    """Who may reach a service by its VIP or hostname."""

    PUBLIC = "Public"
    NAMESPACE = "Namespace"


@dataclass(frozen=True, slots=True)
class Service:
    """A name, its virtual IPs and its ports ({service port: target port}).

    A target port of 0 is a named port: each endpoint says which one it means.
    """

    name: str
    namespace: str
    hostname: str
    vips: tuple[NetworkAddress, ...]
    ports: Mapping[int, int] = field(compare=False)
    cidr_vips: tuple[NetworkCidr, ...] = ()
    subject_alt_names: tuple[SpiffeId, ...] = ()
    waypoint: GatewayAddress | None = None
    weighted_waypoints: tuple[WeightedWaypoint, ...] = ()
    canonical: bool = False
    visibility: Visibility = Visibility.PUBLIC
    balancing: LoadBalancerMode = LoadBalancerMode.STANDARD
    routing_preferences: tuple[RoutingScope, ...] = ()
    allow_unhealthy: bool = False
    ip_families: IpFamilies = IpFamilies.AUTOMATIC

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.hostname}"

    def visible_to(self, namespace: str) -> bool:
        return self.visibility is Visibility.PUBLIC or self.namespace == namespace

    def __str__(self) -> str:
        return self.key
