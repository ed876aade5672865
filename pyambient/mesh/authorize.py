"""L4 authorization: whether a connection may reach the workload that policies guard.

ztunnel's order: a DENY policy that matches decides; without any ALLOW policy all is allowed; then
one ALLOW policy has to match. Policies in dry run never decide, they are only noted. A connection
without identity (plaintext) satisfies no positive match on an identity and every negative one.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeVar

from pyambient.model.policy import (
    Action,
    Clause,
    ConnectionFacts,
    Match,
    MatchKind,
    Network,
    Policy,
    ServiceAccountMatch,
    StringMatch,
    Verdict,
)
from pyambient.model.spiffe import SpiffeId

_F = TypeVar("_F")
_T = TypeVar("_T")
_NO_FIELDS = Match()
_COMPARE: dict[MatchKind, Callable[[str, str], bool]] = {
    MatchKind.EXACT: str.__eq__,
    MatchKind.PREFIX: str.startswith,
    MatchKind.SUFFIX: str.endswith,
    MatchKind.PRESENCE: lambda text, _: text != "",
}
# Few clients make most connections; parsing an address costs more than comparing it.
_parsed = functools.lru_cache(maxsize=4096)(ipaddress.ip_address)


def authorize(policies: Sequence[Policy], facts: ConnectionFacts) -> Verdict:
    """The verdict of all policies that apply to the destination."""
    if not policies:
        return Verdict(allowed=True, reason="no policy applies")
    notes = tuple(_dry_run(policies, facts))
    denies = _enforced(policies, Action.DENY)
    allows = _enforced(policies, Action.ALLOW)
    if denied := _first_match(denies, facts):
        return Verdict(allowed=False, reason=f"explicitly denied by: {denied.key}", notes=notes)
    if not allows:
        return Verdict(allowed=True, reason="no allow policy applies", notes=notes)
    if allowed := _first_match(allows, facts):
        return Verdict(allowed=True, reason=f"allowed by: {allowed.key}", notes=notes)
    return Verdict(allowed=False, reason="allow policies exist, but none allowed", notes=notes)


def policy_matches(policy: Policy, facts: ConnectionFacts) -> bool:
    """Whether any rule matches: all its clauses hold. A policy without rules never matches."""
    return any(all(_clause_holds(c, facts) for c in rule) for rule in policy.rules)


def _enforced(policies: Sequence[Policy], action: Action) -> list[Policy]:
    return [p for p in policies if p.action is action and not p.dry_run]


def _first_match(policies: Iterable[Policy], facts: ConnectionFacts) -> Policy | None:
    return next((p for p in policies if policy_matches(p, facts)), None)


def _dry_run(policies: Sequence[Policy], facts: ConnectionFacts) -> Iterator[str]:
    for policy in policies:
        if policy.dry_run and policy_matches(policy, facts):
            yield f"dry-run: {policy.action.value.lower()} policy {policy.key} matches"


def _clause_holds(clause: Clause, facts: ConnectionFacts) -> bool:
    """Whether any match of the clause holds; a clause without matches does."""
    return not clause or any(match_holds(m, facts) for m in clause)


def match_holds(match: Match, facts: ConnectionFacts) -> bool:
    """Whether every kind of field present holds; a match without fields never does."""
    source, destination, who = facts.source.ip, facts.destination, facts.identity
    return (
        match != _NO_FIELDS
        and _holds(
            destination.port, match.destination_ports, match.not_destination_ports, int.__eq__
        )
        and _holds(source, match.source_ips, match.not_source_ips, _is_within)
        and _holds(destination.ip, match.destination_ips, match.not_destination_ips, _is_within)
        and _holds(who, match.namespaces, match.not_namespaces, _is_of_namespace)
        and _holds(who, match.principals, match.not_principals, _is_principal)
        and _holds(who, match.service_accounts, match.not_service_accounts, _is_account)
    )


def _holds(
    fact: _F,
    wanted: Collection[_T],
    unwanted: Collection[_T],
    satisfies: Callable[[_F, _T], bool],
) -> bool:
    """One kind of field: any of the wanted values, if there are some, and none of the unwanted."""
    if wanted and not any(satisfies(fact, value) for value in wanted):
        return False
    return not (unwanted and any(satisfies(fact, value) for value in unwanted))


def _is_within(ip: str, network: Network) -> bool:
    return _parsed(ip) in network


def _is_of_namespace(who: SpiffeId | None, match: StringMatch) -> bool:
    return who is not None and _COMPARE[match.kind](who.namespace, match.value)


def _is_principal(who: SpiffeId | None, match: StringMatch) -> bool:
    return who is not None and _COMPARE[match.kind](who.principal, match.value)


def _is_account(who: SpiffeId | None, match: ServiceAccountMatch) -> bool:
    return (
        who is not None
        and who.namespace == match.namespace
        and who.service_account == match.service_account
    )
