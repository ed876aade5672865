"""Backend "nftables": the rules of `netfilter` in a table of our own, loaded by nft.

General theory of operation
---------------------------
A pod has one table of each of its families, `ip pyambient` and `ip6 pyambient`, and nobody else's
rules are in them: un-enrolment deletes the tables. (One table of family inet would take as long to
load and delete, and needs a kernel with both families.) They come and go in three transactions,
each for both families: the tables with all base chains and the rules that live connections need;
then the rules in `inbound`; then those in `outbound`. Withdrawing the latter two empties the chains
and leaves them, so that the kernel goes on translating for live connections.

Chains of one hook and priority run in the order they came in, and for a connection the first that
translates decides. Ours have a priority before the usual one: an app's own nat rules do not lead
past the mesh, whenever they are made.

nft only loads. What is there is read, and undone, by nfnetlink (`nf_tables`), so that a pod can be
freed where nft is gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final, Self

from pyambient.model.ports import Ports

from . import nf_tables
from .dns_flows import FORGETTING, forget_dns_flows
from .fib import delivery
from .guards import refuse_guard_node
from .interface import Plan, Pod, PodNetwork, Stage, Step, step
from .netfilter import FOUNDATION, UNTRACKED, Place
from .nf_tables import NFPROTO_IPV4, NFPROTO_IPV6, NFPROTO_UNSPEC, Chain
from .nft_rules import TABLE, encode, text
from .options import DEFAULTS, CaptureOptions
from .probe_source import NftProbeSource, probed
from .programs import installed, not_installed, run
from .sysctl import reserved

_FAMILIES: Final = {"ip": NFPROTO_IPV4, "ip6": NFPROTO_IPV6}
# Two come before conntrack (-200); those of type nat before dstnat (-100). A chain of type route
# has the packets that it marks routed once more.
_CHAINS: Final = {
    Place.REPLIES_IN: {"type": "filter", "hook": "prerouting", "prio": -150},
    Place.REPLIES_OUT: {"type": "route", "hook": "output", "prio": -150},
    Place.LEAVING: {"type": "filter", "hook": "postrouting", "prio": -150},
    Place.UNTRACKED_IN: {"type": "filter", "hook": "prerouting", "prio": -300},
    Place.UNTRACKED_OUT: {"type": "filter", "hook": "output", "prio": -300},
    Place.INBOUND: {"type": "nat", "hook": "prerouting", "prio": -101},
    Place.OUTBOUND: {"type": "nat", "hook": "output", "prio": -101},
}


@dataclass(frozen=True, slots=True)
class _Rules:
    """All rules of some of our chains, made and taken away in one transaction.

    Each is a JSON object as `nft_rules.encode` gives it.
    """

    kind: ClassVar[str]
    stage: ClassVar[Stage]

    rules: tuple[str, ...]

    def describe(self) -> str:
        names = " ".join(dict.fromkeys(chain for _, chain in self.contents()))
        lines = "".join(f"{text(command)}\n" for command in self.commands())
        return f"nft -f - <<END  # {TABLE} {names}\n{lines}END"

    def apply(self, pod: Pod) -> Self:
        document = json.dumps({"nftables": self.commands()})
        run(pod.netns, "nft", "-j", "-f", "-", text=document)
        return self

    def takes_over(self, earlier: Step) -> bool:
        """Applying this one is enough to end other rules in the same chains."""
        if not isinstance(earlier, _Rules) or earlier.kind != self.kind:
            return False
        return earlier.contents().keys() == self.contents().keys()

    def undo(self, pod: Pod) -> None:
        """Empty the chains; the tables stay to the end."""
        nf_tables.flush(pod.netns, [_chain(family, name) for family, name in self.contents()])

    def missing(self, pod: Pod) -> str | None:
        found = {f: nf_tables.comments(pod.netns, _FAMILIES[f], TABLE) for f in self._families()}
        for (family, chain), wanted in self.contents().items():
            present = found[family].get(chain, [])
            lost = [comment for comment in wanted if comment not in present]
            if lost:
                return f"no rule {lost[0]!r} in {family} {TABLE} {chain}"
            if present != wanted:
                return f"{family} {TABLE} {chain} holds other rules than ours"
        return None

    def _has_rules(self, pod: Pod) -> bool:
        """Whether there are rules in the chains, these or others."""
        return any(
            nf_tables.comments(pod.netns, _FAMILIES[family], TABLE).get(chain)
            for family, chain in self.contents()
        )

    def commands(self) -> list[dict[str, Any]]:
        """The transaction: whatever was in the chains, our rules are in them afterwards."""
        return [
            *(_command("flush", family, name) for family, name in self.contents()),
            *({"add": {"rule": json.loads(rule)}} for rule in self.rules),
        ]

    def contents(self) -> dict[tuple[str, str], list[str]]:
        """The comments of the rules of each chain, by the names of its family and its own."""
        contents: dict[tuple[str, str], list[str]] = {}
        for rule in map(json.loads, self.rules):
            contents.setdefault((rule["family"], rule["chain"]), []).append(rule["comment"])
        return contents

    def _families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(family for family, _ in self.contents()))


def _command(verb: str, family: str, chain: str, **definition: Any) -> dict[str, Any]:
    """A command on a chain of ours."""
    return {verb: {"chain": {"family": family, "table": TABLE, "name": chain, **definition}}}


def _chain(family: str, name: str) -> Chain:
    return Chain(_FAMILIES[family], TABLE, name)


@step
@dataclass(frozen=True, slots=True)
class Tables(_Rules):
    """Our tables with all their chains, and the rules that live connections need."""

    kind: ClassVar[str] = "nftables-tables"
    stage: ClassVar[Stage] = Stage.APPLY

    def undo(self, pod: Pod) -> None:
        families = [_FAMILIES[family] for family in self._families()]
        nf_tables.delete_tables(pod.netns, families, TABLE)

    def missing(self, pod: Pod) -> str | None:
        present = nf_tables.chains(pod.netns, NFPROTO_UNSPEC)
        for family in self._families():
            for place in _CHAINS:
                if _chain(family, place.value) not in present:
                    return f"no chain {family} {TABLE} {place.value}"
            if nf_tables.tables(pod.netns, _FAMILIES[family])[TABLE] & nf_tables.DORMANT:
                return f"table {family} {TABLE} is dormant"
        return _Rules.missing(self, pod)

    def commands(self) -> list[dict[str, Any]]:
        made = []
        for family in self._families():
            made.append({"add": {"table": {"family": family, "name": TABLE}}})
            made += [_command("add", family, p.value, **how) for p, how in _CHAINS.items()]
        return [*made, *_Rules.commands(self)]


@step
@dataclass(frozen=True, slots=True)
class Untracked(_Rules):
    """The proxy's own DNS is not tracked: it could be taken for an app's."""

    kind: ClassVar[str] = "nftables-untracked"
    stage: ClassVar[Stage] = Stage.APPLY


@step
@dataclass(frozen=True, slots=True)
class Inbound(_Rules):
    """New TCP connections from outside reach 15006; HBONE and health probes pass."""

    kind: ClassVar[str] = "nftables-inbound"
    stage: ClassVar[Stage] = Stage.STEER


@step
@dataclass(frozen=True, slots=True)
class Outbound(_Rules):
    """New TCP connections of the apps reach 15001; those to the pod itself pass.

    With `dns`, what they ask reaches 15053.
    """

    kind: ClassVar[str] = "nftables-outbound"
    stage: ClassVar[Stage] = Stage.GATE

    dns: bool = False

    def describe(self) -> str:
        return _Rules.describe(self) + (f"\n{FORGETTING}" if self.dns else "")

    def apply(self, pod: Pod) -> Self:
        replaces = self._has_rules(pod)
        _Rules.apply(self, pod)
        try:
            forget_dns_flows(pod, captures=self.dns)
        except BaseException:
            if not replaces:  # or the pod, captured until now, would be open
                _Rules.undo(self, pod)
            raise
        return self

    def undo(self, pod: Pod) -> None:
        _Rules.undo(self, pod)
        forget_dns_flows(pod, captures=False)


class Nftables:
    """Plans a table of each family that the pod has."""

    name: ClassVar[str] = "nftables"

    def plan(
        self,
        pod: Pod,  # noqa: ARG002 - the same for every pod
        network: PodNetwork,
        options: CaptureOptions = DEFAULTS,
    ) -> Plan:
        refuse_guard_node(self.name, options)
        if not installed("nft"):
            raise not_installed("nft")
        families = ("ip", "ip6") if network.has_ipv6 else ("ip",)
        encoded = partial(_encode, options, families, network.ports)
        inbound, untracked = encoded(Place.INBOUND), encoded(*UNTRACKED)
        steps: tuple[Step, ...] = (
            *reserved(network.ports),
            *delivery(network, connects=False),
            Tables(encoded(*FOUNDATION)),
            *([Untracked(untracked)] if untracked else []),
            *(NftProbeSource(ip) for ip in probed(network)),
            *([Inbound(inbound)] if inbound else []),
            Outbound(encoded(Place.OUTBOUND), options.dns),
        )
        return Plan(self.name, network, steps)

    def __repr__(self) -> str:
        return "<Nftables>"


def _encode(
    options: CaptureOptions, families: Iterable[str], ports: Ports, *places: Place
) -> tuple[str, ...]:
    return tuple(
        rule
        for family in families
        for place in places
        for rule in encode(family, place, options, ports)
    )
