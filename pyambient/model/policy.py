"""L4 authorization policies as values (istio.security.Authorization, in Python names).

Rules are alternatives; the clauses of a rule must all hold; the matches of a clause are
alternatives; inside a match every kind of field present must hold.
"""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass, field

from .address import SocketAddress
from .spiffe import SpiffeId

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Scope(enum.Enum):
    GLOBAL = "Global"
    NAMESPACE = "Namespace"
    WORKLOAD_SELECTOR = "WorkloadSelector"


class Action(enum.Enum):
    ALLOW = "Allow"
    DENY = "Deny"


class MatchKind(enum.Enum):
    EXACT = "Exact"
    PREFIX = "Prefix"
    SUFFIX = "Suffix"
    PRESENCE = "Presence"


@dataclass(frozen=True, slots=True)
class StringMatch:
    kind: MatchKind
    value: str = ""


@dataclass(frozen=True, slots=True)
class ServiceAccountMatch:
    """A service account in a namespace, whatever the trust domain."""

    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True)
class Match:
    """Fields that must all hold; the values of one field are alternatives, `not_*` excludes."""

    namespaces: tuple[StringMatch, ...] = ()
    not_namespaces: tuple[StringMatch, ...] = ()
    principals: tuple[StringMatch, ...] = ()
    not_principals: tuple[StringMatch, ...] = ()
    service_accounts: tuple[ServiceAccountMatch, ...] = ()
    not_service_accounts: tuple[ServiceAccountMatch, ...] = ()
    source_ips: tuple[Network, ...] = ()
    not_source_ips: tuple[Network, ...] = ()
    destination_ips: tuple[Network, ...] = ()
    not_destination_ips: tuple[Network, ...] = ()
    destination_ports: tuple[int, ...] = ()
    not_destination_ports: tuple[int, ...] = ()


Clause = tuple[Match, ...]
Rule = tuple[Clause, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """One authorization policy; its key is `<namespace>/<name>`."""

    name: str
    namespace: str
    scope: Scope
    action: Action
    rules: tuple[Rule, ...] = field(default=())
    dry_run: bool = False

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class ConnectionFacts:
    """What a policy can see of a connection; `identity` is None for plaintext."""

    source: SocketAddress
    destination: SocketAddress
    identity: SpiffeId | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the policies say, and why, in ztunnel's words.

    `notes` is what policies in dry run would have said; it never decides.
    """

    allowed: bool
    reason: str
    notes: tuple[str, ...] = ()
