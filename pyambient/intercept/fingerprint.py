"""Whether anything was changed in a pod's network namespace, told in a fraction of a millisecond.

General theory of operation
---------------------------
To ask each step of an enrolment whether it is still there takes 10 to 40 ms a pod, most of it for
decoding netlink messages and for starting iptables. Nobody can do that to 500 pods every few
seconds. But nearly always nothing has changed, and that is cheap to see: the kernel's own answers,
undecoded, are the same bytes as last time. So the steps of a pod are asked when its fingerprint is
another one than when they were last found in place; those about BPF are cheap, leave no trace in
it, and are asked every time. What netfilter backends have on the node has a fingerprint of its own,
which is the same for all pods of a round.

Rules of nftables, and those of iptables-nft, are not read: the kernel counts their transactions.
Tables of iptables-legacy are, without their packet counters.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final

from pyambient.model.numbers import ROUTE_TABLE
from pyambient.netns import Netns

from .interface import Step
from .iptables_tools import legacy_tables
from .legacy_table import read_table
from .sysctl import RESERVED, Sysctl, path_of

_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_RTM_GETROUTE, _RTM_GETRULE = 26, 34
_NETLINK_NETFILTER: Final = 12
_NFT_MSG_GETGEN: Final = 10 << 8 | 16
_SOL_NETLINK, _STRICT_CHECK = 270, 12
_HEADER: Final = struct.Struct("=IHHII")
_FAMILY: Final = struct.Struct("=B11x")
_RTA_TABLE: Final = 15
_LOCAL_TABLE: Final = 255
_BUFFER: Final = 64 << 10
_MOST_MESSAGES: Final = 4096
_SLOT_ROUTE: Final = "slot-route"
_ROUTING: Final = frozenset(("route", "rule", "unreachable-rule", _SLOT_ROUTE))
_SYSCTLS: Final = frozenset(("sysctl", "reserved-ports"))
_NETFILTER: Final = ("iptables-", "nftables-")
_ON_THE_NODE: Final = "-probe-source"


def tells(step: Step) -> bool:
    """Whether a fingerprint changes when this step is lost."""
    of_netfilter = step.kind.startswith(_NETFILTER) and not step.kind.endswith(_ON_THE_NODE)
    return of_netfilter or step.kind in _ROUTING | _SYSCTLS


def node_tells(step: Step) -> bool:
    """Whether the node's own fingerprint changes when this step is lost."""
    return step.kind.endswith(_ON_THE_NODE)


def fingerprint(netns: Netns, steps: Iterable[Step]) -> bytes:
    """What there is in the place of these steps, as bytes that are good for comparing only."""
    told = [step for step in steps if tells(step)]
    return _digest(_parts(netns, told))


def node_fingerprint() -> bytes:
    """The same of the rules of the node, whose network namespace is the calling thread's."""
    with Netns.own() as node:
        return _digest(_netfilter(node))


def _digest(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(struct.pack("=I", len(part)) + part)
    return digest.digest()


def _parts(netns: Netns, steps: list[Step]) -> Iterator[bytes]:
    kinds = {step.kind for step in steps}
    if kinds & _ROUTING:
        tables = (ROUTE_TABLE, _LOCAL_TABLE) if _SLOT_ROUTE in kinds else (ROUTE_TABLE,)
        yield from _routing(netns, tables)
    if kinds & _SYSCTLS:
        yield from _sysctls(netns, steps)
    if any(kind.startswith(_NETFILTER) for kind in kinds):
        yield from _netfilter(netns)


def _netfilter(netns: Netns) -> Iterator[bytes]:
    yield _generation(netns)
    for ipv6 in (False, True):
        for table in legacy_tables(netns, ipv6=ipv6):
            yield read_table(netns, table, ipv6=ipv6)


def _sysctls(netns: Netns, steps: list[Step]) -> list[bytes]:
    names = [RESERVED, *(step.name for step in steps if isinstance(step, Sysctl))]
    values = []
    with netns.entered():
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                values.append(path_of(name).read_bytes())
    return values


def _routing(netns: Netns, tables: tuple[int, ...]) -> Iterator[bytes]:
    """The rules of both families, and the routes of the tables that ours are in."""
    with netns.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        # Linux 4.20: the kernel picks the table's routes out, not we.
        kernel.setsockopt(_SOL_NETLINK, _STRICT_CHECK, 1)
        for family in (socket.AF_INET, socket.AF_INET6):
            yield _ask(kernel, _RTM_GETRULE, _DUMP, _FAMILY.pack(family))
            for table in tables:
                chosen = struct.pack("=HHI", 8, _RTA_TABLE, table)
                yield _ask(kernel, _RTM_GETROUTE, _DUMP, _FAMILY.pack(family) + chosen)


def _generation(netns: Netns) -> bytes:
    """The number of the last transaction of nf_tables; an error's where the kernel has none."""
    with netns.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as kernel:
        answer = _ask(kernel, _NFT_MSG_GETGEN, 0, struct.pack("=BBH", 0, 0, 0))
    # nfgenmsg, then NFTA_GEN_ID; behind it stands who asked.
    return answer[4:12]


def _ask(kernel: socket.socket, kind: int, flags: int, body: bytes) -> bytes:
    """What the kernel answers to one request, without the headers of its messages."""
    size = _HEADER.size + len(body)
    kernel.send(_HEADER.pack(size, kind, _REQUEST | flags, 1, 0) + body)
    answer = b""
    for _ in range(_MOST_MESSAGES):
        messages = kernel.recv(_BUFFER)
        for kind_of, payload in _split(messages):
            answer += payload
            if kind_of in (_ERROR, _DONE) or not flags:
                return answer
    return answer


def _split(messages: bytes) -> Iterator[tuple[int, bytes]]:
    """The type and payload of each netlink message."""
    start = 0
    while start + _HEADER.size <= len(messages):
        size, kind, *_ = _HEADER.unpack_from(messages, start)
        yield kind, messages[start + _HEADER.size : start + size]
        start += (max(size, _HEADER.size) + 3) & ~3
