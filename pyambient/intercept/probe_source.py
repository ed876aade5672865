"""The address that health probes of the node come from, for the netfilter backends.

In the pod a probe looks like whatever else comes from the node's address. So, as Istio does, the
node gives what its own sockets send to an enrolled pod another source, and in the pod that source
is let through to the app. Rules in nat, one for each address of a pod, in the node's own network
namespace. A pod has to have a route back to that source; a default route is one.

Any socket of the node's own network is taken for a prober, that of a pod on the host network as
well: netfilter tells no more than that there is a socket.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

from pyambient.errors import PyambientError
from pyambient.model.numbers import PROBE_ADDRESS_V4, PROBE_ADDRESS_V6
from pyambient.netns import Netns

from . import nf_tables
from .interface import Pod, PodNetwork, Stage, step
from .iptables_tools import tool
from .programs import run

_TABLE: Final = "pyambient_node"
_CHAIN: Final = "postrouting"
# Before srcnat (100): what masquerades all that leaves would come first otherwise.
_PRIORITY: Final = 99
_NO_USER: Final = 0xFFFFFFFF


def probed(network: PodNetwork) -> list[str]:
    """The pod's addresses that the node can probe, each once."""
    found = (address.ip for address in network.addresses if address.device != "lo")
    return [ip for ip in dict.fromkeys(found) if "%" not in ip]


@dataclass(frozen=True, slots=True)
class _ProbeSource(ABC):
    """A rule of the node for one address of a pod."""

    stage: ClassVar[Stage] = Stage.APPLY

    ip: str

    @property
    def source(self) -> str:
        return PROBE_ADDRESS_V6 if self.is_ipv6 else PROBE_ADDRESS_V4

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.ip

    @property
    def family(self) -> int:
        return nf_tables.NFPROTO_IPV6 if self.is_ipv6 else nf_tables.NFPROTO_IPV4

    def apply(self, pod: Pod) -> Self:
        if self.missing(pod):
            with Netns.own() as node:
                self._add(node)
        return self

    def undo(self, pod: Pod) -> None:  # noqa: ARG002 - it is in the node's namespace
        with Netns.own() as node:
            self._remove(node)

    def missing(self, pod: Pod) -> str | None:  # noqa: ARG002 - as for undo
        with Netns.own() as node:
            there = self._is_there(node)
        return None if there else f"the node has no source address for probes of {self.ip}"

    @abstractmethod
    def _add(self, node: Netns) -> None: ...

    @abstractmethod
    def _remove(self, node: Netns) -> None:
        """What is gone already is no error."""

    @abstractmethod
    def _is_there(self, node: Netns) -> bool: ...


@step
@dataclass(frozen=True, slots=True)
class NftProbeSource(_ProbeSource):
    """In a table of our own, which goes with the last rule; the comment is the pod's address."""

    kind: ClassVar[str] = "nftables-probe-source"

    def describe(self) -> str:
        name = f"{'ip6' if self.is_ipv6 else 'ip'} {_TABLE} {_CHAIN}"
        condition = f"ip{'6' * self.is_ipv6} daddr {self.ip} meta l4proto tcp meta skuid != 2^32-1"
        return f"nft add rule {name} {condition} snat to {self.source}  # on the node"

    def _add(self, node: Netns) -> None:
        family = "ip6" if self.is_ipv6 else "ip"
        place = {"family": family, "table": _TABLE}
        hook = {"type": "nat", "hook": _CHAIN, "prio": _PRIORITY}
        commands = (
            {"table": {"family": family, "name": _TABLE}},
            {"chain": {**place, "name": _CHAIN, **hook}},
            {"rule": {**place, "chain": _CHAIN, "comment": self.ip, "expr": self._expression()}},
        )
        document = json.dumps({"nftables": [{"add": command} for command in commands]})
        run(node, "nft", "-j", "-f", "-", text=document)

    def _expression(self) -> list[dict[str, Any]]:
        destination = {"payload": {"protocol": "ip6" if self.is_ipv6 else "ip", "field": "daddr"}}
        tests = (
            ("==", destination, self.ip),
            ("==", {"meta": {"key": "l4proto"}}, "tcp"),
            # Without a socket there is no user to compare: the rule does not match.
            ("!=", {"meta": {"key": "skuid"}}, _NO_USER),
        )
        matches = [{"match": {"op": op, "left": one, "right": other}} for op, one, other in tests]
        return [*matches, {"snat": {"addr": self.source}}]

    def _remove(self, node: Netns) -> None:
        nf_tables.delete_rule(node, nf_tables.Chain(self.family, _TABLE, _CHAIN), self.ip)
        nf_tables.delete_if_empty(node, self.family, _TABLE, [_CHAIN], with_table=True)

    def _is_there(self, node: Netns) -> bool:
        return self.ip in nf_tables.comments(node, self.family, _TABLE).get(_CHAIN, [])


@step
@dataclass(frozen=True, slots=True)
class IptablesProbeSource(_ProbeSource):
    """In POSTROUTING, before what others have there."""

    kind: ClassVar[str] = "iptables-probe-source"

    variant: str

    def describe(self) -> str:
        return f"{self._tool} -t nat -I POSTROUTING {' '.join(self._rule())}  # on the node"

    @property
    def _tool(self) -> str:
        return tool("", self.variant, ipv6=self.is_ipv6)

    def _rule(self) -> tuple[str, ...]:
        return (
            *("-d", self.ip, "-p", "tcp", "-m", "owner", "--socket-exists"),
            *("-j", "SNAT", "--to-source", self.source),
        )

    def _run(self, node: Netns, verb: str) -> None:
        run(node, self._tool, "-w", "-t", "nat", verb, "POSTROUTING", *self._rule())

    def _add(self, node: Netns) -> None:
        self._run(node, "-I")

    def _remove(self, node: Netns) -> None:
        with contextlib.suppress(PyambientError):
            self._run(node, "-D")
        if self.variant == "nft":
            nf_tables.delete_if_empty(node, self.family, "nat", ["POSTROUTING"], with_table=True)

    def _is_there(self, node: Netns) -> bool:
        try:
            self._run(node, "-C")
        except PyambientError:
            return False
        return True
