"""What conntrack knows of a pod's flows, in ctnetlink's own words (linux/nfnetlink_conntrack.h).

The proxy asks once per DNS query, so this is one small message each way on one open socket, and
pyroute2 is not needed. Kernels answer within send(2): an answer that is not there does not come.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Final, NamedTuple

from pyambient.model.address import SocketAddress
from pyambient.netns import Netns

from .netlink_socket import NetlinkSocket, attributes_of, packed

_NETLINK_NETFILTER: Final = 12
_GET, _DELETE = 0x101, 0x102  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*
_NLA_F_NESTED: Final = 0x8000
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY = 1, 2
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
# CTA_IP_*: of the source and of the destination.
_CTA_IP: Final[dict[int, tuple[int, int]]] = {socket.AF_INET: (1, 2), socket.AF_INET6: (3, 4)}

_FAMILY: Final = struct.Struct("=BBH")  # nfgenmsg


class Flow(NamedTuple):
    """The two ends of a flow, as its packets in one direction name them."""

    source: SocketAddress
    destination: SocketAddress


class Entry(NamedTuple):
    """A tracked flow: what opened it, and what its answers are expected to be."""

    opening: Flow
    answers: Flow


class Conntrack(NetlinkSocket):
    """A ctnetlink socket of a pod (needs CAP_NET_ADMIN there); close it when done.

    Its flows are those of one protocol, UDP unless told.
    """

    def __init__(self, netns: Netns, protocol: int = socket.IPPROTO_UDP) -> None:
        super().__init__(netns, _NETLINK_NETFILTER)
        self._socket.setblocking(False)
        self._protocol = bytes((protocol,))

    def opening(self, answers: Flow) -> Flow | None:
        """What opened the flow whose answers are these; None if there is none.

        OSError where the kernel has no ctnetlink.
        """
        found = self._entry(_CTA_TUPLE_REPLY, answers)
        return found.opening if found else None

    def answers(self, opening: Flow) -> Flow | None:
        """What the answers are expected to be to the flow that this opened; None if there is none.

        OSError where the kernel has no ctnetlink.
        """
        found = self._entry(_CTA_TUPLE_ORIG, opening)
        return found.answers if found else None

    def _entry(self, which: int, flow: Flow) -> Entry | None:
        try:
            answer = self.get(_GET, self._question(which, flow))
        except FileNotFoundError:
            return None
        return None if answer is None else self._read(answer)

    def entries(self, family: int) -> list[Entry]:
        """All flows of one address family."""
        found = map(self._read, self.dump(_GET, _FAMILY.pack(family, 0, 0)))
        return [entry for entry in found if entry is not None]

    def forget(self, opening: Flow) -> None:
        """Delete the flow that this opened; one that is gone is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.change(_DELETE, 0, self._question(_CTA_TUPLE_ORIG, opening))

    def _read(self, body: bytes) -> Entry | None:
        """None if it is of another protocol."""
        family, attributes = body[0], attributes_of(body[_FAMILY.size :])
        opening, answers = (
            self._flow(family, attributes[which]) for which in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY)
        )
        return Entry(opening, answers) if opening and answers else None

    def _flow(self, family: int, raw: bytes) -> Flow | None:
        ends = attributes_of(raw)
        protocol, addresses = (
            attributes_of(ends[_CTA_TUPLE_PROTO]),
            attributes_of(ends[_CTA_TUPLE_IP]),
        )
        if family not in _CTA_IP or protocol[_CTA_PROTO_NUM] != self._protocol:
            return None
        ports = (protocol[_CTA_PROTO_SRC_PORT], protocol[_CTA_PROTO_DST_PORT])
        source, destination = (
            SocketAddress(socket.inet_ntop(family, addresses[kind]), int.from_bytes(port))
            for kind, port in zip(_CTA_IP[family], ports, strict=True)
        )
        return Flow(source, destination)

    def _question(self, kind: int, flow: Flow) -> bytes:
        """A CTA_TUPLE_*: the flow's addresses, the protocol and the ports."""
        family = flow.source.family
        addresses = {
            which: socket.inet_pton(family, end.ip.partition("%")[0])
            for which, end in zip(_CTA_IP[family], flow, strict=True)
        }
        protocol = {
            _CTA_PROTO_NUM: self._protocol,
            _CTA_PROTO_SRC_PORT: flow.source.port.to_bytes(2),
            _CTA_PROTO_DST_PORT: flow.destination.port.to_bytes(2),
        }
        inner = {
            _CTA_TUPLE_IP | _NLA_F_NESTED: packed(addresses),
            _CTA_TUPLE_PROTO | _NLA_F_NESTED: packed(protocol),
        }
        return _FAMILY.pack(family, 0, 0) + packed({kind | _NLA_F_NESTED: packed(inner)})
