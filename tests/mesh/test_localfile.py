"""ztunnel's local file: what it says becomes values, with nothing lost."""

from __future__ import annotations

import ipaddress
import textwrap
from pathlib import Path

import pytest

from pyambient.mesh.localfile import parse, read
from pyambient.model.policy import (
    Action,
    Match,
    MatchKind,
    Scope,
    ServiceAccountMatch,
    StringMatch,
)
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
    TunnelledProtocol,
    TunnelProtocol,
    Visibility,
    WeightedWaypoint,
)
from tests.mesh import filetext
from tests.mesh.build import spiffe

COMPLETE = Path(__file__).with_name("ztunnel.yaml")


def load(text):
    return parse(textwrap.dedent(text), "mesh.yaml")


def test_complete_example():
    """A file as ztunnel takes it loads, with nothing lost."""
    config, _ = read(COMPLETE)
    client, server = config.workloads
    [service] = config.services
    [policy] = config.policies
    assert client.uid == "Kubernetes//Pod/default/client"
    assert client.identity == spiffe("client")
    assert (client.workload_type, client.canonical_revision) == ("deployment", "v1")
    assert client.protocol is TunnelProtocol.HBONE
    assert server.addresses == ("10.10.2.2", "fd00:10:10:2::2")
    assert server.locality == Locality("r1", "z1", "s1")
    assert server.policies == ("default/allow-client",)
    assert server.services == {service.key: {80: 8080}}
    assert service.vips == (NetworkAddress("", "10.96.0.10"),)
    assert service.subject_alt_names == (spiffe("server"),)
    assert service.balancing is LoadBalancerMode.FAILOVER
    assert service.routing_preferences == (
        RoutingScope.NETWORK,
        RoutingScope.REGION,
        RoutingScope.ZONE,
    )
    assert service.canonical
    assert not service.allow_unhealthy
    assert (policy.scope, policy.action) == (Scope.WORKLOAD_SELECTOR, Action.ALLOW)
    principals = (StringMatch(MatchKind.EXACT, "cluster.local/ns/default/sa/client"),)
    assert policy.rules == (((Match(principals=principals),), (Match(destination_ports=(8080,)),)),)


def test_defaults():
    """What ztunnel leaves empty is filled in, so that identities are whole."""
    [workload] = load(
        """
        workloads:
        - {name: a, namespace: ns, workloadIps: [10.0.0.1], services: {}}
        """
    ).workloads
    assert workload.uid == "Kubernetes//Pod/ns/a"
    assert str(workload.identity) == "spiffe://cluster.local/ns/ns/sa/default"
    assert workload.protocol is TunnelProtocol.NONE
    assert workload.cluster_id == "Kubernetes"
    assert (workload.status, workload.capacity) == (HealthStatus.HEALTHY, 1)
    assert not workload.host_network


def test_trust_domain_of_the_mesh():
    """Workloads that name no trust domain are of the one the mesh has."""
    text = "workloads: [{name: a, namespace: ns, workloadIps: [], services: {}}]"
    assert parse(text, "f", "example.org").workloads[0].trust_domain == "example.org"


def test_every_key_of_a_workload():
    """All that a workload can say is taken or, where it changes nothing here, checked."""
    [workload] = load(
        """
        workloads:
        - uid: u
          name: w
          namespace: ns
          serviceAccount: sa
          trustDomain: example.org
          network: net
          workloadIps: [10.0.0.1, "::ffff:10.0.0.2", "FD00:0::1"]
          protocol: HBONE
          networkMode: HostNetwork
          workloadName: wn
          workloadType: job
          canonicalName: cn
          canonicalRevision: "1.10"
          hostname: h.example
          node: n
          nativeTunnel: true
          applicationTunnel: {protocol: PROXY, port: 15088}
          authorizationPolicies: [ns/p, /global]
          status: Unhealthy
          clusterId: c
          locality: {region: r, zone: "", subzone: ""}
          waypoint: {destination: ns/waypoint.ns.svc, hboneMtlsPort: 15008}
          networkGateway: {destination: other/10.9.9.9, hboneMtlsPort: 15009}
          services: {ns/svc.example: {80: 0, "443": 8443}}
          capacity: 7
        """
    ).workloads
    assert workload.uid == "u"
    assert workload.addresses == ("10.0.0.1", "10.0.0.2", "fd00::1")
    assert str(workload.identity) == "spiffe://example.org/ns/ns/sa/sa"
    assert (workload.network, workload.node, workload.cluster_id) == ("net", "n", "c")
    assert (workload.workload_name, workload.canonical_name) == ("wn", "cn")
    assert (workload.workload_type, workload.canonical_revision) == ("job", "1.10")
    assert workload.host_network
    assert workload.status is HealthStatus.UNHEALTHY
    assert workload.application_tunnel == ApplicationTunnel(TunnelledProtocol.PROXY, 15088)
    assert workload.policies == ("ns/p", "/global")
    assert workload.locality == Locality("r")
    assert workload.waypoint == GatewayAddress(NamespacedHostname("ns", "waypoint.ns.svc"), 15008)
    assert workload.services == {"ns/svc.example": {80: 0, 443: 8443}}
    assert (workload.capacity, workload.hostname) == (7, "h.example")


def test_every_key_of_a_service():
    """All that a service can say is taken."""
    [service] = load(
        """
        services:
        - name: s
          namespace: ns
          hostname: s.example
          vips: [/10.96.0.1, net/fd96::1]
          cidrVips: [{network: "", cidr: 10.97.0.0/16}]
          ports: {80: 8080}
          subjectAltNames: [spiffe://cluster.local/ns/default/sa/a]
          waypoint: {destination: /10.0.0.9, hboneMtlsPort: 15008}
          weightedWaypoints:
          - {destination: {destination: /10.0.0.8, hboneMtlsPort: 15008}, weight: 3}
          loadBalancer: {routingPreferences: [Node], mode: Strict, healthPolicy: AllowAll}
          ipFamilies: IPv6
          canonical: true
          visibility: Namespace
        """
    ).services
    assert service.key == "ns/s.example"
    assert service.vips == (NetworkAddress("", "10.96.0.1"), NetworkAddress("net", "fd96::1"))
    assert service.cidr_vips == (NetworkCidr("", ipaddress.ip_network("10.97.0.0/16")),)
    assert service.ports == {80: 8080}
    assert service.subject_alt_names == (spiffe("a"),)
    assert service.waypoint == GatewayAddress(NetworkAddress("", "10.0.0.9"), 15008)
    instead = GatewayAddress(NetworkAddress("", "10.0.0.8"), 15008)
    assert service.weighted_waypoints == (WeightedWaypoint(instead, 3),)
    assert service.balancing is LoadBalancerMode.STRICT
    assert service.routing_preferences == (RoutingScope.NODE,)
    assert service.allow_unhealthy
    assert service.ip_families is IpFamilies.IPV6
    assert service.visibility is Visibility.NAMESPACE


def test_every_field_of_a_match():
    """All that a policy can match on is taken, with the four tags."""
    [policy] = load(
        """
        policies:
        - name: p
          namespace: ""
          scope: Global
          action: Deny
          dryRun: true
          rules:
          - - - namespaces: [!Exact a, !Prefix "b"]
                notNamespaces: [!Suffix c]
                principals: [!Presence []]
                notPrincipals: [!Presence ]
                serviceAccounts: [{namespace: n, serviceAccount: s}]
                notServiceAccounts: [{namespace: n, serviceAccount: t}]
                sourceIps: [10.0.0.7/8, "::ffff:10.1.0.0/112"]
                notSourceIps: [fd00::/8, fd00::/112]
                destinationIps: [10.0.0.1]
                notDestinationIps: []
                destinationPorts: [80, 443]
                notDestinationPorts: [22]
        """
    ).policies
    nets = [
        ipaddress.ip_network(n) for n in ("10.0.0.0/8", "10.1.0.0/16", "fd00::/8", "fd00::/112")
    ]
    presence = (StringMatch(MatchKind.PRESENCE),)
    assert (policy.key, policy.scope, policy.action) == ("/p", Scope.GLOBAL, Action.DENY)
    assert policy.dry_run
    assert policy.rules[0][0][0] == Match(
        namespaces=(StringMatch(MatchKind.EXACT, "a"), StringMatch(MatchKind.PREFIX, "b")),
        not_namespaces=(StringMatch(MatchKind.SUFFIX, "c"),),
        principals=presence,
        not_principals=presence,
        service_accounts=(ServiceAccountMatch("n", "s"),),
        not_service_accounts=(ServiceAccountMatch("n", "t"),),
        source_ips=tuple(nets[:2]),
        not_source_ips=tuple(nets[2:]),
        destination_ips=(ipaddress.ip_network("10.0.0.1"),),
        destination_ports=(80, 443),
        not_destination_ports=(22,),
    )


def test_uid_of_a_nameless_workload():
    """Without uid and name a workload is told apart by its address or host name."""
    text = """
        workloads:
        - {namespace: ns, workloadIps: [10.0.0.1], services: {}}
        - {namespace: ns, workloadIps: [], hostname: h.example, services: {}}
        """
    uids = [w.uid for w in load(text).workloads]
    assert uids == ["Kubernetes//Pod/ns/10.0.0.1", "Kubernetes//Pod/ns/h.example"]


@pytest.mark.parametrize(("mode", "expected"), [("Standard", False), ("HostNetwork", True)])
def test_network_mode(mode, expected):
    """Just a host-network workload shares its node's addresses."""
    assert load(filetext.workload(networkMode=mode)).workloads[0].host_network is expected


def test_types_of_yaml_1_2():
    """Words that just YAML 1.1 takes for something else are text, as in ztunnel."""
    text = "workloads: [{name: no, node: 1:30, namespace: on, workloadIps: [], services: {}}]"
    [workload] = load(text).workloads
    assert (workload.name, workload.node, workload.namespace) == ("no", "1:30", "on")


def test_nothing_in_it():
    """A mapping without keys is a mesh without content."""
    assert str(load("{}")) == "0 workloads, 0 services, 0 policies"


def test_anchors():
    """Aliases stand for what they name."""
    config = load(
        """
        services:
        - {name: a, namespace: n, hostname: a, vips: [], ports: &ports {80: 8080}}
        - {name: b, namespace: n, hostname: b, vips: [], ports: *ports}
        """
    )
    assert [dict(s.ports) for s in config.services] == [{80: 8080}] * 2
