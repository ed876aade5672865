"""The fence: TCP and DNS leave a pod by devices that have their programs, and by no other.

General theory of operation
---------------------------
Backend `tc` captures at devices. One that comes later has no program until the agent has heard of
it; whatever the pod sends by it in between would leave as it is. So one rule of nf_tables looks at
all that leaves, by which device ever, and drops what should have been captured unless the device
is in a set. A device comes into the set after its programs were attached, by its index: a name may
be another device's the next moment. What was lost meanwhile the sender sends again (TCP), or is
told (EPERM, a query over UDP).

Routing cannot do that. Rules see the device that a socket is bound to and no other; and where the
look-up of a bound IPv4 socket fails, the kernel takes the destination for on-link. A hook of the
cgroup sees no packet that the pod forwards.

What nf_tables does not see passes the fence: packet sockets, and frames that a bridge in the pod
takes from one device to the other.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple, Self

from pyambient.errors import UnsupportedFeature
from pyambient.model.numbers import RESOLVER_PORT
from pyambient.netns import Netns

from .device_program import DeviceProgram
from .egress_guard import EgressGuard
from .interface import Pod, PodNetwork, Stage, Step, step
from .nf_tables import DORMANT
from .nft_messages import (
    ACCEPT,
    DROP,
    Table,
    comment_data,
    counter,
    other_destination_port,
    output_device_in,
    packets_of,
    protocol,
    verdict,
)
from .nft_rules import TABLE
from .options import CaptureOptions
from .rtnetlink import device_names
from .tc_steps import Redirect

_SET: Final = "devices"
_CHAIN: Final = "leaving"
# Behind the chains of others: what they do to a packet is done.
_PRIORITY: Final = 500
_LO_INDEX: Final = 1
_TCP, _UDP = 6, 17
_COUNTED: Final = "what is held back"
_ABSENT: Final = frozenset(
    (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT)
)
_USERDATA: Final = 7  # NFTA_RULE_USERDATA


class _Rule(NamedTuple):
    """In nft's language (nft(8)) and in the kernel's; it is known again by `why`, its comment."""

    text: str
    expressions: list[bytes]
    why: str


@step
@dataclass(frozen=True, slots=True)
class Fence:
    """What of `devices` has its programs may be left by; with `dns`, DNS is held back as well.

    With `counts_only` nothing is.
    """

    kind: ClassVar[str] = "nftables-fence"
    stage: ClassVar[Stage] = Stage.GATE

    bpffs: str
    cookie: int
    devices: tuple[str, ...]
    dns: bool = True
    counts_only: bool = False

    def describe(self) -> str:
        chain = f"inet {TABLE} {_CHAIN}"
        devices = ", ".join(("lo", *self.devices))
        lines = [
            f"nft -f - <<END  # {TABLE} {_CHAIN}",
            f"add table inet {TABLE}",
            f"add set inet {TABLE} {_SET} {{ type iface_index; elements = {{ {devices} }}; }}",
            f"add chain {chain} {{ type filter hook postrouting priority {_PRIORITY}; }}",
            *(f'add rule {chain} {rule.text} comment "{rule.why}"' for rule in self._rules()),
            "END",
        ]
        return "\n".join(lines)

    def apply(self, pod: Pod) -> Self:
        table = Table(TABLE)
        try:
            if self._broken(pod.netns) is not None:
                self._build(table)
            table.fill(_SET, [_LO_INDEX, *self._captured(pod)])
            table.commit(pod.netns)
        except OSError as error:
            raise _absent(error) from None
        return self

    def takes_over(self, earlier: Step) -> bool:
        """Rules and set change at one moment."""
        return isinstance(earlier, Fence) and self != earlier

    def undo(self, pod: Pod) -> None:
        table = Table(TABLE)
        try:
            if table.flags(pod.netns) is not None:
                table.delete()
                table.commit(pod.netns)
        except OSError as error:
            if error.errno not in _ABSENT | {errno.ENOENT}:
                raise

    def missing(self, pod: Pod) -> str | None:
        if broken := self._broken(pod.netns):
            return broken
        names, open_ones = device_names(pod.netns), Table(TABLE).elements(pod.netns, _SET)
        closed = {_LO_INDEX, *self._captured(pod)} - open_ones
        if closed:
            return f"{names.get(min(closed), 'a device')} is captured, and still held back"
        return "a device that is gone is not held back" if open_ones - names.keys() else None

    def held_back(self, netns: Netns) -> int:
        """How many packets, since the rules were made."""
        for rule in Table(TABLE).rules(netns, _CHAIN):
            if rule.get(_USERDATA) == comment_data(_COUNTED):
                return packets_of(rule)
        return 0

    def _captured(self, pod: Pod) -> list[int]:
        """The devices that have both programs, whatever they are called by now."""
        places: list[tuple[DeviceProgram, DeviceProgram]] = [
            (Redirect(self.bpffs, name, self.cookie), EgressGuard(self.bpffs, name, self.cookie))
            for name in self.devices
        ]
        found = ((one.attached_to(pod), other.attached_to(pod)) for one, other in places)
        return [one for one, other in found if one is not None and one == other]

    def _build(self, table: Table) -> None:
        """Anew, whatever was there under its name."""
        table.add()
        table.delete()
        table.add()
        table.add_set_of_devices(_SET)
        table.add_chain(_CHAIN, _PRIORITY)
        for rule in self._rules():
            table.add_rule(_CHAIN, rule.expressions, rule.why)

    def _broken(self, netns: Netns) -> str | None:
        """What is wrong with table and rules."""
        table = Table(TABLE)
        flags = table.flags(netns)
        if flags is None:
            return f"there is no table inet {TABLE}"
        if flags & DORMANT:
            return f"table inet {TABLE} is dormant"
        present = [rule.get(_USERDATA) for rule in table.rules(netns, _CHAIN)]
        if present != [comment_data(rule.why) for rule in self._rules()]:
            return f"inet {TABLE} {_CHAIN} holds other rules than ours"
        return None

    def _rules(self) -> Iterator[_Rule]:
        """What cannot be read ends a rule as what is not meant does, and is held back."""
        accept = [verdict(ACCEPT)]
        yield _Rule(f"oif @{_SET} accept", output_device_in(_SET) + accept, "by a captured device")
        others = protocol(_TCP, equal=False)
        if not self.dns:
            yield _Rule("meta l4proto != tcp accept", others + accept, "not TCP")
        else:
            neither = others + protocol(_UDP, equal=False) + accept
            text = "meta l4proto != tcp meta l4proto != udp accept"
            yield _Rule(text, neither, "neither TCP nor UDP")
            elsewhere = protocol(_UDP, equal=True) + other_destination_port(RESOLVER_PORT) + accept
            yield _Rule(f"udp dport != {RESOLVER_PORT} accept", elsewhere, "no DNS")
        yield _Rule("counter", [counter()], _COUNTED)
        if not self.counts_only:
            yield _Rule("drop", [verdict(DROP)], "until the device is captured")


def fence(
    bpffs: str, cookie: int, network: PodNetwork, options: CaptureOptions
) -> tuple[Step, ...]:
    """What stands behind the guards, as their operator chose."""
    if options.guard == "off":
        return ()
    counts_only = options.guard == "count"
    return (Fence(bpffs, cookie, network.devices, options.dns, counts_only),)


def _absent(error: OSError) -> Exception:
    if error.errno in _ABSENT:
        return UnsupportedFeature("nf_tables", "3.14", "use another --backend, or --guard off")
    return error
