"""The one line for everything that can be wrong with a mesh file."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyambient.errors import UsageError
from pyambient.mesh import yamlreader
from pyambient.mesh.localfile import MAX_BYTES, MeshFileError, parse, read
from tests.mesh.filetext import policy, service, workload

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


REQUIRED = [
    (workload, "workloads[0]", None, ["workloadIps", "namespace", "services"]),
    (service, "services[0]", None, ["name", "namespace", "hostname", "vips", "ports"]),
    (policy, "policies[0]", None, ["name", "namespace", "scope", "action", "rules"]),
    (workload, "workloads[0]", "waypoint", {"destination": "/10.0.0.9", "hboneMtlsPort": "1"}),
    (workload, "workloads[0]", "locality", {"region": "r", "zone": "z", "subzone": "s"}),
    (workload, "workloads[0]", "applicationTunnel", {"protocol": "PROXY"}),
    (
        service,
        "services[0]",
        "loadBalancer",
        {"routingPreferences": "[Node]", "mode": "Strict", "healthPolicy": "AllowAll"},
    ),
]
LISTED = [
    ("cidrVips", {"network": "n", "cidr": "10.0.0.0/8"}),
    (
        "weightedWaypoints",
        {"destination": "{destination: /10.0.0.9, hboneMtlsPort: 1}", "weight": "1"},
    ),
]
ACCOUNT = {"namespace": "n", "serviceAccount": "s"}


def without(given, left_out):
    """A mapping of one key fewer, as YAML in one line."""
    return "{" + ", ".join(f"{k}: {v}" for k, v in given.items() if k != left_out) + "}"


def incomplete():
    """Files that lack one required key each, and the key."""
    for build, path, within, keys in REQUIRED:
        for key in keys:
            if within is None:
                yield build(**{key: None}), f"{path}.{key}"
            else:
                yield build(**{within: without(keys, key)}), f"{path}.{within}.{key}"
    for name, given_keys in LISTED:
        for key in given_keys:
            text = service(**{name: f"[{without(given_keys, key)}]"})
            yield text, f"services[0].{name}[0].{key}"
    for key in ACCOUNT:
        text = policy(f"{{serviceAccounts: [{without(ACCOUNT, key)}]}}")
        yield text, f"{MATCH}.serviceAccounts[0].{key}"


@pytest.mark.parametrize(("text", "key"), list(incomplete()))
def test_missing_key(text, key):
    """Every key that ztunnel requires is missed by name."""
    with pytest.raises(MeshFileError) as caught:
        parse(text, "mesh.yaml")
    assert f": key '{key}': is missing; add it" in str(caught.value)


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
