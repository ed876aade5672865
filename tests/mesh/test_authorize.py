"""L4 policies: what matches, and what follows from it."""

from __future__ import annotations

import dataclasses
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyambient.mesh.authorize import authorize, policy_matches
from pyambient.model.address import SocketAddress
from pyambient.model.policy import (
    Action,
    ConnectionFacts,
    Match,
    MatchKind,
    ServiceAccountMatch,
    StringMatch,
)
from tests.mesh.build import policy, spiffe

FACTS = ConnectionFacts(
    SocketAddress("10.0.0.1", 40000), SocketAddress("10.0.0.2", 8080), spiffe("client")
)
PLAINTEXT = dataclasses.replace(FACTS, identity=None)
V6 = ConnectionFacts(
    SocketAddress("fe80::1%2", 40000), SocketAddress("fd00::2", 8080), spiffe("client")
)


def exact(text):
    return (StringMatch(MatchKind.EXACT, text),)


def prefix(text):
    return (StringMatch(MatchKind.PREFIX, text),)


def suffix(text):
    return (StringMatch(MatchKind.SUFFIX, text),)


PRESENCE = (StringMatch(MatchKind.PRESENCE),)
PRINCIPAL = "cluster.local/ns/default/sa/client"


def account(name, namespace="default"):
    return (ServiceAccountMatch(namespace, name),)


def nets(*texts):
    return tuple(map(ipaddress.ip_network, texts))


@pytest.mark.parametrize(
    ("match", "facts", "expected"),
    [
        (Match(principals=exact(PRINCIPAL)), FACTS, True),
        (Match(principals=exact(f"spiffe://{PRINCIPAL}")), FACTS, False),
        (Match(principals=exact(PRINCIPAL)), PLAINTEXT, False),
        (Match(principals=exact("other") + exact(PRINCIPAL)), FACTS, True),
        (Match(principals=prefix("cluster.local/")), FACTS, True),
        (Match(principals=prefix("local/")), FACTS, False),
        (Match(principals=prefix("")), FACTS, True),
        (Match(principals=prefix("")), PLAINTEXT, False),
        (Match(principals=suffix("/sa/client")), FACTS, True),
        (Match(principals=suffix("/sa/clien")), FACTS, False),
        (Match(principals=PRESENCE), FACTS, True),
        (Match(principals=PRESENCE), PLAINTEXT, False),
        (Match(not_principals=PRESENCE), FACTS, False),
        (Match(not_principals=PRESENCE), PLAINTEXT, True),
        (Match(not_principals=exact(PRINCIPAL)), FACTS, False),
        (Match(not_principals=exact("other")), FACTS, True),
        (Match(namespaces=exact("default")), FACTS, True),
        (Match(namespaces=exact("defaul")), FACTS, False),
        (Match(namespaces=exact("default")), PLAINTEXT, False),
        (Match(namespaces=exact("")), PLAINTEXT, False),
        (Match(not_namespaces=exact("default")), FACTS, False),
        (Match(not_namespaces=exact("default")), PLAINTEXT, True),
        (Match(service_accounts=account("client")), FACTS, True),
        (Match(service_accounts=account("client", "other")), FACTS, False),
        (Match(service_accounts=account("client")), PLAINTEXT, False),
        (Match(not_service_accounts=account("client")), FACTS, False),
        (Match(not_service_accounts=account("client")), PLAINTEXT, True),
        (Match(source_ips=nets("10.0.0.0/24")), FACTS, True),
        (Match(source_ips=nets("10.0.0.2/32")), FACTS, False),
        (Match(source_ips=nets("::/0")), FACTS, False),
        (Match(source_ips=nets("::/0")), V6, True),
        (Match(source_ips=nets("fe80::/10")), V6, True),
        (Match(source_ips=nets("0.0.0.0/0")), V6, False),
        (Match(not_source_ips=nets("10.0.0.0/24")), FACTS, False),
        (Match(destination_ips=nets("10.0.0.2/32")), FACTS, True),
        (Match(destination_ips=nets("10.0.0.1/32")), FACTS, False),
        (Match(not_destination_ips=nets("10.0.0.2/32")), FACTS, False),
        (Match(destination_ports=(80, 8080)), FACTS, True),
        (Match(destination_ports=(80,)), FACTS, False),
        (Match(not_destination_ports=(80,)), FACTS, True),
        (Match(not_destination_ports=(8080,)), FACTS, False),
        (Match(not_destination_ports=(80, 8080)), FACTS, False),
        (Match(destination_ports=(8080,), principals=exact(PRINCIPAL)), FACTS, True),
        (Match(destination_ports=(80,), principals=exact(PRINCIPAL)), FACTS, False),
        (Match(destination_ports=(8080,), not_destination_ports=(8080,)), FACTS, False),
        (Match(), FACTS, False),
    ],
)
def test_match(match, facts, expected):
    """Every kind of field present must hold; a match without fields never does."""
    assert policy_matches(policy("p", match), facts) is expected


YES, NO = Match(destination_ports=(8080,)), Match(destination_ports=(1,))


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ((), False),
        (((),), True),
        ((((),),), True),
        ((((YES,),),), True),
        ((((NO,),),), False),
        ((((NO, YES),),), True),
        ((((YES,), (NO,)),), False),
        ((((YES,), (YES,)),), True),
        ((((NO,),), ((YES,),)), True),
        ((((YES,), ()),), True),
    ],
)
def test_rules(rules, expected):
    """Rules are alternatives, a rule's clauses all hold, a clause's matches are alternatives."""
    assert policy_matches(policy("p", rules=rules), FACTS) is expected


ALLOW, ALLOW_OTHER = policy("allow", YES), policy("other", NO)
DENY, DENY_OTHER = (policy(n, m, action=Action.DENY) for n, m in (("deny", YES), ("den", NO)))
TRIAL = policy("trial", YES, action=Action.DENY, dry_run=True)
TRIAL_ALLOW = policy("trial-allow", YES, dry_run=True)


@pytest.mark.parametrize(
    ("policies", "allowed", "reason"),
    [
        ([], True, "no policy applies"),
        ([DENY_OTHER], True, "no allow policy applies"),
        ([DENY], False, "explicitly denied by: default/deny"),
        ([ALLOW], True, "allowed by: default/allow"),
        ([ALLOW_OTHER], False, "allow policies exist, but none allowed"),
        ([ALLOW_OTHER, ALLOW], True, "allowed by: default/allow"),
        ([ALLOW, DENY], False, "explicitly denied by: default/deny"),
        ([ALLOW, DENY_OTHER], True, "allowed by: default/allow"),
        ([TRIAL], True, "no allow policy applies"),
        ([TRIAL, ALLOW], True, "allowed by: default/allow"),
        ([TRIAL_ALLOW, ALLOW_OTHER], False, "allow policies exist, but none allowed"),
    ],
)
def test_verdict(policies, allowed, reason):
    """A deny decides, then one allow must match if there are any; the reasons are ztunnel's."""
    verdict = authorize(policies, FACTS)
    assert (verdict.allowed, verdict.reason) == (allowed, reason)


def test_dry_run_is_noted():
    """A policy in dry run says what it would have done, and only if it matches."""
    silent = policy("silent", NO, dry_run=True)
    verdict = authorize([TRIAL, silent, TRIAL_ALLOW, DENY], FACTS)
    assert verdict.notes == (
        "dry-run: deny policy default/trial matches",
        "dry-run: allow policy default/trial-allow matches",
    )


def test_strict_peer_authentication():
    """Strict mutual TLS, as Istio sends it: a deny of whoever has no principal."""
    strict = policy("strict", Match(not_principals=PRESENCE), action=Action.DENY)
    assert authorize([strict], FACTS).allowed
    assert not authorize([strict], PLAINTEXT).allowed


words = st.sampled_from(["", "default", "other", "cluster.local/", PRINCIPAL, "/sa/client"])
strings = st.lists(st.builds(StringMatch, st.sampled_from(MatchKind), words), max_size=2)
networks = st.lists(st.sampled_from(nets("10.0.0.0/24", "10.0.0.2/32", "fd00::/8")), max_size=2)
ports = st.lists(st.sampled_from([80, 8080]), max_size=2)
accounts = st.lists(st.builds(ServiceAccountMatch, words, words), max_size=1)
FIELDS = {
    "namespaces": strings,
    "principals": strings,
    "service_accounts": accounts,
    "source_ips": networks,
    "destination_ips": networks,
    "destination_ports": ports,
}
matches = st.builds(
    Match,
    **{name: values.map(tuple) for key, values in FIELDS.items() for name in (key, f"not_{key}")},
)
clauses = st.lists(matches, max_size=2).map(tuple)
rules = st.lists(st.lists(clauses, max_size=2).map(tuple), max_size=2).map(tuple)
policies = st.builds(
    policy,
    st.sampled_from("abc"),
    action=st.sampled_from(Action),
    rules=rules,
    dry_run=st.booleans(),
)
connections = st.sampled_from([FACTS, PLAINTEXT, V6])


@given(st.lists(policies, max_size=5), connections)
def test_deny_beats_allow(given_policies, facts):
    """A matching deny refuses whatever else there is; more allows never let it through."""
    deny = policy("no", Match(not_destination_ports=(1,)), action=Action.DENY)
    assert not authorize([*given_policies, deny], facts).allowed
    assert not authorize([deny, *given_policies, ALLOW], facts).allowed


@given(st.lists(policies, max_size=5), connections)
def test_order_does_not_matter(given_policies, facts):
    """The verdict is that of a set of policies."""
    backwards = authorize(given_policies[::-1], facts)
    assert authorize(given_policies, facts).allowed == backwards.allowed


@given(st.lists(policies, max_size=5), connections)
def test_dry_run_never_decides(given_policies, facts):
    """Policies in dry run can be left out without changing what is decided."""
    enforced = [p for p in given_policies if not p.dry_run]
    assert authorize(given_policies, facts).allowed == authorize(enforced, facts).allowed


@given(matches, connections, st.sampled_from(sorted(FIELDS)))
def test_not_is_the_opposite(match, facts, key):
    """A field on its own and its `not_` never both hold, and one of them does."""
    values = getattr(match, key)
    if not values:
        return
    positive = policy_matches(policy("p", Match(**{key: values})), facts)
    negative = policy_matches(policy("p", Match(**{f"not_{key}": values})), facts)
    assert positive is not negative


@given(matches, connections)
def test_all_fields_must_hold(match, facts):
    """A match holds exactly if each of its fields would hold alone."""
    present = {f.name: getattr(match, f.name) for f in dataclasses.fields(Match)}
    alone = [
        policy_matches(policy("p", Match(**{name: values})), facts)
        for name, values in present.items()
        if values
    ]
    assert policy_matches(policy("p", match), facts) is (bool(alone) and all(alone))
