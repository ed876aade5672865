"""Backend "iptables": Istio's rules in the pod, for nodes without eBPF and without nft.

The rules are those of `netfilter`, in Istio's chains. The tables of iptables-nft go last
(`NftTables`): translation ends with the last base chain.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

from pyambient.errors import PyambientError
from pyambient.model.numbers import LOOPBACK_MARK, MARK_MASK
from pyambient.model.ports import Ports

from . import netfilter, nf_tables
from .dns_flows import FORGETTING, forget_dns_flows
from .fib import delivery
from .guards import refuse_guard_node
from .interface import Plan, Pod, PodNetwork, Stage, Step, step
from .iptables_tools import choose_variant, tool
from .netfilter import FOUNDATION, UNTRACKED, Action, Field, Match, Place, Rule
from .options import DEFAULTS, CaptureOptions
from .probe_source import IptablesProbeSource, probed
from .programs import run
from .selection import PortRange
from .sysctl import reserved

_INBOUND, _OUTBOUND, _LEAVING = "ISTIO_PRERT", "ISTIO_OUTPUT", "ISTIO_POSTRT"
_HOOKS = {_INBOUND: "PREROUTING", _OUTBOUND: "OUTPUT", _LEAVING: "POSTROUTING"}
_PLACES = {
    Place.REPLIES_IN: _INBOUND,
    Place.REPLIES_OUT: _OUTBOUND,
    Place.LEAVING: _LEAVING,
    Place.UNTRACKED_IN: _INBOUND,
    Place.UNTRACKED_OUT: _OUTBOUND,
    Place.INBOUND: _INBOUND,
    Place.OUTBOUND: _OUTBOUND,
}
_OPTIONS = {
    Field.INPUT_DEVICE: "-i",
    Field.SOURCE: "-s",
    Field.DESTINATION: "-d",
    Field.OUTPUT_DEVICE: "-o",
    Field.PROTOCOL: "-p",
    Field.DESTINATION_PORT: "--dport",
    Field.UDP_SOURCE_PORT: "--sport",
    Field.UDP_DESTINATION_PORT: "--dport",
    Field.MARK: "--mark",
    Field.CONNECTION_MARK: "--mark",
}
_MODULES = {Field.MARK: "-m mark ", Field.CONNECTION_MARK: "-m connmark "}
# From here on it is worth while to look for rules as they are saved: -C reads all of a chain for
# each, which takes minutes with 10,000.
_MANY = 100
_MOST_RANGES = 7  # multiport has 15 places, and a range takes two
_TARGETS = {
    Action.ACCEPT: "ACCEPT",
    Action.DROP: "DROP",
    Action.RETURN: "RETURN",
    Action.REDIRECT: "REDIRECT --to-ports",
    Action.NOT_TRACKED: "CT --notrack",
    Action.NOTE_ON_CONNECTION: f"CONNMARK --set-xmark {LOOPBACK_MARK:#x}/{MARK_MASK:#x}",
    Action.MARK_AS_CONNECTION: "CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff",
}


@dataclass(frozen=True, slots=True)
class _Chains:
    """Chains of ours in one table with their rules, made and taken away in one transaction.

    `variant` is as `choose_variant` gives it.
    """

    kind: ClassVar[str]
    stage: ClassVar[Stage]
    table: ClassVar[str]
    chains: ClassVar[tuple[str, ...]]

    ipv6: bool
    variant: str
    rules: tuple[str, ...]

    def describe(self) -> str:
        what = f"{self.table} {' '.join(self.chains)}"
        return f"{self._tool('restore')} -w --noflush <<END  # {what}\n{self._transaction()}END"

    def apply(self, pod: Pod) -> Self:
        try:
            self._restore(pod, self._transaction())
        except PyambientError:
            self._make_whole(pod)
        return self

    def takes_over(self, earlier: Step) -> bool:
        """Applying this one is enough to end other rules in the same chains."""
        place = (type(self), self.ipv6, self.variant)
        return isinstance(earlier, _Chains) and place == (
            (type(earlier), earlier.ipv6, earlier.variant)
        )

    def _make_whole(self, pod: Pod) -> None:
        """Have our rules in the chains, whatever was, in one transaction: no packet slips past."""
        made_or_emptied = [f":{chain} - [0:0]" for chain in self.chains]
        found = [line for line in self._saved(pod) if _jumps_to(line, self.chains)]
        jumps = [] if found == self._jumps() else [*(f"-D{j[2:]}" for j in found), *self._jumps()]
        self._restore(pod, self._document([*made_or_emptied, *jumps, *self.rules]))

    def undo(self, pod: Pod) -> None:
        """Delete the chains and whatever jumps to them, as far as they are there."""
        saved = self._saved(pod)
        present = [c for c in self.chains if any(line.startswith(f":{c} ") for line in saved)]
        jumps = [f"-D{line[2:]}" for line in saved if _jumps_to(line, self.chains)]
        if present:
            removal = [*jumps, *(f"-F {c}" for c in present), *(f"-X {c}" for c in present)]
            self._restore(pod, self._document(removal))

    def missing(self, pod: Pod) -> str | None:
        rules = [*self._jumps(), *self.rules]
        if len(rules) > _MANY:
            found = set(self._saved(pod))
            rules = [rule for rule in rules if rule not in found]
        try:
            self._restore(pod, self._document([f"-C{rule[2:]}" for rule in rules]))
        except PyambientError as error:
            # Line 1 of the document names the table.
            line = re.search(r"line:? (\d+)", error.what)
            return f"no rule {rules[int(line[1]) - 2]}" if line else error.what
        return None

    def _transaction(self) -> str:
        return self._document([*(f"-N {c}" for c in self.chains), *self._jumps(), *self.rules])

    def _document(self, lines: Iterable[str]) -> str:
        return "\n".join([f"*{self.table}", *lines, "COMMIT\n"])

    def _jumps(self) -> list[str]:
        return [f"-A {_HOOKS[chain]} -j {chain}" for chain in self.chains]

    def _has_rules(self, pod: Pod) -> bool:
        """Whether the chains are there, with these rules or others."""
        starts = tuple(f":{chain} " for chain in self.chains)
        return any(line.startswith(starts) for line in self._saved(pod))

    def _saved(self, pod: Pod) -> list[str]:
        return run(pod.netns, self._tool("save"), "-t", self.table).splitlines()

    def _restore(self, pod: Pod, document: str) -> None:
        run(pod.netns, self._tool("restore"), "-w", "--noflush", text=document)

    def _tool(self, action: str) -> str:
        return tool(action, self.variant, ipv6=self.ipv6)


def _jumps_to(line: str, chains: tuple[str, ...]) -> bool:
    """Whether a line of iptables-save is a rule of a foreign chain that jumps to one of ours."""
    words = line.split()
    return words[:1] == ["-A"] and words[1] not in chains and words[-1] in chains


@step
@dataclass(frozen=True, slots=True)
class Foundation(_Chains):
    """What live connections need: an app's answers come back to the proxy that speaks with the
    client's address, and nothing that was redirected leaves by a device.
    """

    kind: ClassVar[str] = "iptables-foundation"
    stage: ClassVar[Stage] = Stage.APPLY
    table: ClassVar[str] = "mangle"
    chains: ClassVar[tuple[str, ...]] = (_INBOUND, _OUTBOUND, _LEAVING)


@step
@dataclass(frozen=True, slots=True)
class Untracked(_Chains):
    """The proxy's own DNS is not tracked: it could be taken for an app's."""

    kind: ClassVar[str] = "iptables-untracked"
    stage: ClassVar[Stage] = Stage.APPLY
    table: ClassVar[str] = "raw"
    chains: ClassVar[tuple[str, ...]] = (_INBOUND, _OUTBOUND)


@step
@dataclass(frozen=True, slots=True)
class InboundRedirect(_Chains):
    """New TCP connections from outside reach 15006; HBONE and health probes pass."""

    kind: ClassVar[str] = "iptables-inbound"
    stage: ClassVar[Stage] = Stage.STEER
    table: ClassVar[str] = "nat"
    chains: ClassVar[tuple[str, ...]] = (_INBOUND,)


@step
@dataclass(frozen=True, slots=True)
class OutboundRedirect(_Chains):
    """New TCP connections of the apps reach 15001; those to the pod itself pass.

    With `dns`, what they ask reaches 15053.
    """

    kind: ClassVar[str] = "iptables-outbound"
    stage: ClassVar[Stage] = Stage.GATE
    table: ClassVar[str] = "nat"
    chains: ClassVar[tuple[str, ...]] = (_OUTBOUND,)

    dns: bool = False

    def describe(self) -> str:
        return _Chains.describe(self) + (f"\n{FORGETTING}" if self.dns else "")

    def apply(self, pod: Pod) -> Self:
        replaces = self._has_rules(pod)
        _Chains.apply(self, pod)
        try:
            forget_dns_flows(pod, captures=self.dns)
        except BaseException:
            if not replaces:  # or the pod, captured until now, would be open
                _Chains.undo(self, pod)
            raise
        return self

    def undo(self, pod: Pod) -> None:
        _Chains.undo(self, pod)
        forget_dns_flows(pod, captures=False)


@step
@dataclass(frozen=True, slots=True)
class NftTables:
    """The tables and base chains that iptables-nft makes on its way and never takes away.

    `before` holds those that were there already, as `nat` and `nat/OUTPUT`.
    """

    kind: ClassVar[str] = "iptables-nft-tables"
    stage: ClassVar[Stage] = Stage.APPLY

    ipv6: bool
    before: tuple[str, ...] | None = field(default=None, compare=False)

    def describe(self) -> str:
        family = "ip6" if self.ipv6 else "ip"
        return f"# nft delete table {family} {{nat,mangle,raw}} at the end, if they are empty then"

    def observed(self, pod: Pod) -> Self:
        if self.before is not None:
            return self
        names = set(nf_tables.tables(pod.netns, self._family))
        chains = nf_tables.chains(pod.netns, self._family)
        names.update(f"{chain.table}/{chain.name}" for chain in chains)
        return replace(self, before=tuple(sorted(names)))

    def apply(self, pod: Pod) -> Self:
        """Change nothing: the steps that follow make the tables."""
        return self.observed(pod)

    def undo(self, pod: Pod) -> None:
        if self.before is None:
            return
        chains = nf_tables.chains(pod.netns, self._family)
        for table in ("nat", "mangle", "raw"):
            made = [c.name for c in chains if c.table == table and c.name in _HOOKS.values()]
            made = [name for name in made if f"{table}/{name}" not in self.before]
            if made:
                absent = table not in self.before
                nf_tables.delete_if_empty(pod.netns, self._family, table, made, with_table=absent)

    def missing(self, pod: Pod) -> str | None:  # noqa: ARG002 - nothing that could be missing
        return None

    @property
    def _family(self) -> int:
        return nf_tables.NFPROTO_IPV6 if self.ipv6 else nf_tables.NFPROTO_IPV4


class Iptables:
    """Plans Istio's in-pod rules for a pod; `variant` None takes what suits the pod."""

    name: ClassVar[str] = "iptables"

    def __init__(self, variant: str | None = None) -> None:
        self.variant = variant

    def plan(
        self,
        pod: Pod,
        network: PodNetwork,
        options: CaptureOptions = DEFAULTS,
    ) -> Plan:
        refuse_guard_node(self.name, options)
        variant = choose_variant(pod.netns) if self.variant is None else self.variant
        lines = partial(_lines, options, network.ports)
        steps: list[Step] = [*reserved(network.ports), *delivery(network, connects=False)]
        for ipv6 in (False, True) if network.has_ipv6 else (False,):
            if variant == "nft":
                steps.append(NftTables(ipv6))
            inbound = lines(Place.INBOUND, ipv6=ipv6)
            outbound = lines(Place.OUTBOUND, ipv6=ipv6)
            steps.append(Foundation(ipv6, variant, lines(*FOUNDATION, ipv6=ipv6)))
            untracked = lines(*UNTRACKED, ipv6=ipv6)
            steps += [Untracked(ipv6, variant, untracked)] if untracked else []
            steps += [InboundRedirect(ipv6, variant, inbound)] if inbound else []
            steps.append(OutboundRedirect(ipv6, variant, outbound, options.dns))
        steps += (IptablesProbeSource(ip, variant) for ip in probed(network))
        return Plan(self.name, network, tuple(sorted(steps, key=lambda s: s.stage)))

    def __repr__(self) -> str:
        return f"<Iptables {self.variant or 'of the pod'}>"


def _lines(options: CaptureOptions, ports: Ports, *places: Place, ipv6: bool) -> tuple[str, ...]:
    """The rules of these places in the words of iptables."""
    return tuple(
        f"-A {_PLACES[place]} {_words(single)}"
        for place in places
        for rule in netfilter.rules(place, options, ipv6=ipv6, ports=ports)
        for single in _singles(rule)
    )


def _singles(rule: Rule) -> Iterator[Rule]:
    """The rule once for each of the values that a condition may have: iptables knows no sets."""
    for at, match in enumerate(rule.matches):
        if isinstance(match.value, tuple):
            for value in _values(match.value):
                single = (*rule.matches[:at], replace(match, value=value), *rule.matches[at + 1 :])
                yield from _singles(replace(rule, matches=single))
            return
    yield rule


def _values(several: tuple[str, ...] | tuple[PortRange, ...]) -> Iterator[str]:
    """CIDRs one by one; ports by as many ranges as the match multiport takes."""
    for chunk in (several[at : at + _MOST_RANGES] for at in range(0, len(several), _MOST_RANGES)):
        ports = [str(p).replace("-", ":") for p in chunk if isinstance(p, PortRange)]
        yield from [",".join(ports)] if ports else map(str, chunk)


def _words(rule: Rule) -> str:
    port = (str(rule.port),) if rule.action is Action.REDIRECT else ()
    return " ".join([*map(_condition, rule.matches), "-j", _TARGETS[rule.action], *port])


def _condition(match: Match) -> str:
    if match.field is Field.TCP_OPENING:
        return "--syn"
    if match.field is Field.DESTINATION_PORT and isinstance(match.value, str):
        return f"-m multiport --dports {match.value}"
    masked = match.field in _MODULES
    value = f"{match.value:#x}/{MARK_MASK:#x}" if masked else match.value
    negation = "! " * match.negated
    return f"{_MODULES.get(match.field, '')}{negation}{_OPTIONS[match.field]} {value}"
