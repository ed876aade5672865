"""ztunnel's local file: what it says, and the one line for everything that is wrong with it."""

from __future__ import annotations

import ipaddress
import os
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyambient.errors import UsageError
from pyambient.mesh import yamlreader
from pyambient.mesh.localfile import MAX_BYTES, MeshFileError, parse, read
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
                notSourceIps: [fd00::/8]
                destinationIps: [10.0.0.1]
                notDestinationIps: []
                destinationPorts: [80, 443]
                notDestinationPorts: [22]
        """
    ).policies
    nets = [ipaddress.ip_network(n) for n in ("10.0.0.0/8", "10.1.0.0/16", "fd00::/8")]
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
        not_source_ips=(nets[2],),
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


def workload(**changes):
    """A file with one workload, one key of it changed; None leaves the key out."""
    given = {"name": "a", "namespace": "ns", "workloadIps": "[10.0.0.1]", "services": "{}"}
    lines = [f"{k}: {v}" for k, v in (given | changes).items() if v is not None]
    return "workloads:\n- " + "\n  ".join(lines) + "\n"


def service(**changes):
    given = {"name": "a", "namespace": "ns", "hostname": "h", "vips": "[]", "ports": "{}"}
    lines = [f"{k}: {v}" for k, v in (given | changes).items() if v is not None]
    return "services:\n- " + "\n  ".join(lines) + "\n"


def policy(match="{}", **changes):
    given = {"name": "a", "namespace": "ns", "scope": "Global", "action": "Allow"}
    lines = [f"{k}: {v}" for k, v in (given | changes).items() if v is not None]
    return "policies:\n- " + "\n  ".join([*lines, f"rules: [[[{match}]]]"]) + "\n"


MATCH = "policies[0].rules[0][0][0]"
MALFORMED = [
    # the file as a whole
    ("", 1, None, "the file is empty; write {} for"),
    ("# nothing but a comment\n", 1, None, "the file is empty; write {} for"),
    ("- a\n", 1, None, "is a list, not a mapping; write it as 'key: value' lines"),
    ("text\n", 1, None, "is text, not a mapping"),
    ("workloads: [\n  a\n", 3, None, "did not find expected ',' or ']'; correct the YAML"),
    ("a: b\n\tc: d\n", 2, None, "; correct the YAML"),
    ("workloads: []\n---\nservices: []\n", 2, None, "but found another document"),
    ("workloads: *nowhere\n", 1, None, "found undefined alias"),
    ("workloads: []\nname: a\x01b\n", 2, None, "control characters are not allowed"),
    ("[" * 5000, 1, None, "; correct the YAML"),
    # keys
    ("worklods: []\n", 1, "worklods", "is not a key of this format; did you mean 'workloads'?"),
    ("x: []\n", 1, "x", "the keys here are workloads, services, policies"),
    ("? [a]\n: b\n", 1, "?", "is not a key of this format"),
    ("workloads:\n", 1, "workloads", "is nothing, not a list; write it as lines that start"),
    ("workloads: {}\n", 1, "workloads", "is a mapping, not a list"),
    ("workloads: []\nworkloads: []\n", 2, "workloads", "stands twice, first on line 1"),
    (
        workload(serviceAcount="a"),
        6,
        "workloads[0].serviceAcount",
        "did you mean 'serviceAccount'?",
    ),
    (workload(namespace=None), 2, "workloads[0].namespace", "is missing; add it"),
    (workload(services=None), 2, "workloads[0].services", "is missing; add it"),
    (policy(scope=None), 2, "policies[0].scope", "is missing; add it"),
    # types
    ("workloads: [a]\n", 1, "workloads[0]", "is text, not a mapping"),
    (workload(name="5"), 2, "workloads[0].name", "is a number, not text; write text, in quotes"),
    (workload(name="1e3"), 2, "workloads[0].name", "is a number, not text"),
    (workload(name="true"), 2, "workloads[0].name", "is true or false, not text"),
    (workload(name="~"), 2, "workloads[0].name", "is nothing, not text"),
    (workload(name="[a]"), 2, "workloads[0].name", "is a list, not text"),
    (workload(nativeTunnel="yes"), 6, "workloads[0].nativeTunnel", "is text, not true or false"),
    (workload(capacity='"1"'), 6, "workloads[0].capacity", "is text, not a number"),
    (workload(capacity="1.5"), 6, "workloads[0].capacity", "'1.5' does not fit; write a whole"),
    (workload(capacity="-1"), 6, "workloads[0].capacity", "'-1' does not fit"),
    (workload(capacity="010"), 6, "workloads[0].capacity", "'010' does not fit"),
    (workload(capacity="9" * 40), 6, "workloads[0].capacity", "does not fit"),
    (workload(name="!!python/object/apply:os.abort []"), 2, "workloads[0].name", "a value tagged"),
    (workload(name="!Exact a"), 2, "workloads[0].name", "a value tagged !Exact, not text"),
    # values
    (
        workload(workloadIps="[10.0.0.256]"),
        4,
        "workloads[0].workloadIps[0]",
        "is not an IP address",
    ),
    (workload(workloadIps="[10.0.0.1/24]"), 4, "workloads[0].workloadIps[0]", "is not an IP"),
    (workload(namespace="a/b"), 3, "workloads[0].namespace", "'a/b' is not a name of letters"),
    (workload(trustDomain='""'), 6, "workloads[0].trustDomain", "'' is not a trust domain"),
    (workload(protocol="TLS"), 6, "workloads[0].protocol", "'TLS' is not known here; write one of"),
    (workload(services="{a: {}}"), 5, "workloads[0].services.a", "is not two names with a slash"),
    (workload(services="{a/b: {0: 1}}"), 5, "workloads[0].services.a/b.0", "'0' does not fit"),
    (workload(services="{a/b: {80: 70000}}"), 5, "workloads[0].services.a/b.80", "does not fit"),
    (
        workload(authorizationPolicies="[a]"),
        6,
        "workloads[0].authorizationPolicies[0]",
        "'a' is not",
    ),
    (workload(locality="{region: r}"), 6, "workloads[0].locality.subzone", "is missing"),
    (
        workload(waypoint="{destination: a, hboneMtlsPort: 1}"),
        6,
        "workloads[0].waypoint.destination",
        "write <network>/<IP> or",
    ),
    (
        workload(waypoint="{destination: /a/b, hboneMtlsPort: 1}"),
        6,
        "workloads[0].waypoint.destination",
        "is not two names",
    ),
    (workload(name=None, workloadIps="[]"), 2, "workloads[0]", "neither uid, name, address nor"),
    (
        service(vips="[10.96.0.1]"),
        5,
        "services[0].vips[0]",
        "names no network; write <network>/<IP>",
    ),
    (service(vips="[/name]"), 5, "services[0].vips[0]", "'name' is not an IP address"),
    (
        service(cidrVips="[{network: n, cidr: 10.0.0.0/33}]"),
        7,
        "services[0].cidrVips[0].cidr",
        "does not appear",
    ),
    (
        service(subjectAltNames="[spiffe://td/x]"),
        7,
        "services[0].subjectAltNames[0]",
        "is not spiffe://",
    ),
    (service(hostname='""'), 4, "services[0].hostname", "'' is not a host name"),
    (
        service(loadBalancer="{mode: Strict}"),
        7,
        "services[0].loadBalancer.healthPolicy",
        "is missing",
    ),
    (service(endpoints="{}"), 7, "services[0].endpoints", "is not a key of this format"),
    (policy(action="Audit"), 5, "policies[0].action", "write one of Allow, Deny"),
    (policy("{sourceIps: [10.0.0.0/64]}"), 6, f"{MATCH}.sourceIps[0]", "write a range such as"),
    (policy("{destinationPorts: [0]}"), 6, f"{MATCH}.destinationPorts[0]", "'0' does not fit"),
    (policy("{principal: []}"), 6, f"{MATCH}.principal", "did you mean 'principals'?"),
    (policy("{principals: }"), 6, f"{MATCH}.principals", "is nothing, not a list"),
    (policy("{principals: [a]}"), 6, f"{MATCH}.principals[0]", "is text, without a tag of !Exact"),
    (policy("{principals: [!Glob a]}"), 6, f"{MATCH}.principals[0]", "is a value tagged !Glob"),
    (
        policy("{principals: [!Exact [a]]}"),
        6,
        f"{MATCH}.principals[0]",
        "!Exact stands without text",
    ),
    (policy('{principals: [!Prefix ""]}'), 6, f"{MATCH}.principals[0]", "or !Presence [] for any"),
    (policy("{principals: [!Presence a]}"), 6, f"{MATCH}.principals[0]", "!Presence stands with a"),
    # things that may exist once
    (
        workload() + "- {name: a, namespace: ns, workloadIps: [], services: {}}",
        6,
        "workloads[1]",
        "uid 'Kubernetes//Pod/ns/a' is on line 2 already",
    ),
    (
        service() + "- {name: b, namespace: ns, hostname: h, vips: [], ports: {}}",
        7,
        "services[1]",
        "service 'ns/h' is on line 2 already",
    ),
    (
        policy() + "- {name: a, namespace: ns, scope: Global, action: Deny, rules: []}",
        7,
        "policies[1]",
        "policy 'ns/a' is on line 2 already",
    ),
]


@pytest.mark.parametrize(("text", "line", "key", "what"), MALFORMED)
def test_malformed(text, line, key, what):
    """Whatever is wrong with a file is one line: file, line, key, what and what to do."""
    with pytest.raises(MeshFileError) as caught:
        parse(text, "mesh.yaml")
    message = str(caught.value)
    where = f"mesh.yaml:{line}: " + (f"key '{key}': " if key else "")
    assert message.startswith(where), message
    assert what in message
    assert message.isprintable()
    assert caught.value.then
    assert isinstance(caught.value, UsageError)


def test_quoted_from_the_file():
    """What an error quotes from the file stays on its line and short."""
    with pytest.raises(MeshFileError) as caught:
        parse('workloads: [{"a\\nb' + "x" * 100_000 + '": 1}]', "mesh.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000


def test_alias_bomb(monkeypatch):
    """A few lines of aliases do not become millions of matches."""
    monkeypatch.setattr(yamlreader, "_MAX_VALUES", 20_000)
    head = "policies:\n- {name: a, namespace: n, scope: Global, action: Allow, rules: [[["
    layers = [
        "&m {destinationPorts: [80]}" + ", *m" * 40 + "], &c [*m" + ", *m" * 40 + "]",
        ", *c" * 40 + "], &r [*c" + ", *c" * 40 + "]",
        ", *r" * 40 + "]}\n",
    ]
    with pytest.raises(MeshFileError, match="more than 20000 values; split the mesh"):
        parse(head + "".join(layers), "mesh.yaml")


@given(st.text(max_size=200))
def test_any_text(text):
    """No text raises anything but the one line."""
    try:
        parse(text, "mesh.yaml")
    except MeshFileError as error:
        assert str(error).startswith("mesh.yaml:")  # noqa: PT017


words = st.sampled_from(["workloads", "services", "policies", "a/b", "80", "!Exact a", "~", "1"])
trees = st.recursive(
    words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=20,
)


def flow(tree):
    """A tree of lists and mappings as YAML in one line."""
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key}: {flow(value)}" for key, value in tree.items()) + "}"
    return "[" + ", ".join(map(flow, tree)) + "]" if isinstance(tree, list) else tree


@given(st.dictionaries(st.sampled_from(["workloads", "services", "policies"]), trees))
def test_any_tree(tree):
    """No YAML raises anything but the one line."""
    try:
        parse(flow(tree), "mesh.yaml")
    except MeshFileError as error:
        assert str(error).startswith("mesh.yaml:1: ")  # noqa: PT017


def test_not_utf8(tmp_path):
    """Bytes that are not UTF-8 are found by their line."""
    path = tmp_path / "mesh.yaml"
    path.write_bytes(b"workloads: []\n# \xff\n")
    with pytest.raises(MeshFileError, match=r"mesh.yaml:2: not UTF-8; save the file as UTF-8"):
        read(path)


def test_too_large(tmp_path):
    """A file above the bound is not read on."""
    path = tmp_path / "mesh.yaml"
    path.touch()
    os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(MeshFileError, match=r"mesh.yaml: larger than 10 MiB; take out"):
        read(path)


def test_largest(tmp_path):
    """A file of just the bound is read."""
    path = tmp_path / "mesh.yaml"
    path.write_text("{}\n#" + "x" * (MAX_BYTES - 4))
    assert path.stat().st_size == MAX_BYTES
    assert read(path)[0].workloads == ()


@pytest.mark.parametrize("kind", ["absent", "directory", "fifo"])
def test_no_file(tmp_path, kind):
    """What is not a readable file is said to be that, without waiting for it."""
    path = tmp_path / "mesh.yaml"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    expected = "cannot be read: No such file" if kind == "absent" else "is not a regular file"
    with pytest.raises(MeshFileError, match=expected):
        read(path)
