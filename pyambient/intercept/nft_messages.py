"""What `nft` would send to nf_tables, as bytes: for what must work where it is not installed.

The names and numbers are those of linux/netfilter/nf_tables.h. A rule runs its expressions one
after the other; one that compares ends the rule if it does not hold, and so does one that cannot
read what it is to load.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Final

from pyambient.netns import Netns

from .netlink_socket import (
    Attributes,
    Message,
    NetlinkSocket,
    attributes_of,
    each_attribute,
    packed,
)

NFPROTO_INET: Final = 1
_NETLINK_NETFILTER: Final = 12
_SUBSYSTEM: Final = 10  # NFNL_SUBSYS_NFTABLES
_BEGIN, _END = 0x10, 0x11  # NFNL_MSG_BATCH_BEGIN and _END
_CREATE, _APPEND = 0x400, 0x800
_NEWTABLE, _GETTABLE, _DELTABLE, _NEWCHAIN = 0, 1, 2, 3
_NEWRULE, _GETRULE, _NEWSET = 6, 7, 9
_NEWSETELEM, _GETSETELEM, _DELSETELEM = 12, 13, 14
_FAMILY: Final = struct.Struct("=BBH")  # nfgenmsg
_ELEMENT: Final = 1  # NFTA_LIST_ELEM
_VALUE: Final = 1  # NFTA_DATA_VALUE
_MOST_ELEMENTS: Final = 1000  # of a message: an attribute ends at 64 KiB
_TYPE_IFINDEX: Final = 20  # of nft's data types, for who lists the set
_POSTROUTING: Final = 4
_REGISTER: Final = struct.pack("!I", 1)  # NFT_REG_1
_VERDICT_REGISTER: Final = struct.pack("!I", 0)
_OUTPUT_INDEX, _L4PROTO = 5, 16  # NFT_META_OIF and NFT_META_L4PROTO
_EQUAL, _UNEQUAL = 0, 1
_TRANSPORT: Final = 2  # NFT_PAYLOAD_TRANSPORT_HEADER
_DESTINATION_PORT: Final = (2, 2)  # offset and length, in UDP's header and in TCP's

DROP, ACCEPT = 0, 1  # NF_DROP and NF_ACCEPT


class Table:
    """One table of family inet in a pod: changes are gathered, and made by `commit`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._changes: list[Message] = []

    def add(self) -> None:
        self._change(_NEWTABLE, {1: _text(self.name), 2: _number(0)}, _CREATE)

    def delete(self) -> None:
        self._change(_DELTABLE, {1: _text(self.name)})

    def add_chain(self, name: str, priority: int) -> None:
        """A chain that sees what leaves the pod, by whatever device."""
        hook = {1: _number(_POSTROUTING), 2: struct.pack("!i", priority)}
        attributes = {1: _text(self.name), 3: _text(name), 4: packed(hook), 7: _text("filter")}
        self._change(_NEWCHAIN, attributes, _CREATE)

    def add_set_of_devices(self, name: str) -> None:
        attributes = {2: _text(name), 3: _number(0), 4: _number(_TYPE_IFINDEX), 5: _number(4)}
        self._change(_NEWSET, {1: _text(self.name), **attributes, 10: _number(1)}, _CREATE)

    def add_rule(self, chain: str, expressions: Iterable[bytes], comment: str) -> None:
        attributes = {2: _text(chain), 4: _list(expressions), 7: comment_data(comment)}
        self._change(_NEWRULE, {1: _text(self.name), **attributes}, _CREATE | _APPEND)

    def fill(self, name: str, devices: Sequence[int]) -> None:
        """Have these in the set, and no others."""
        where = {1: _text(self.name), 2: _text(name)}
        self._change(_DELSETELEM, where)
        for start in range(0, len(devices), _MOST_ELEMENTS):
            some = devices[start : start + _MOST_ELEMENTS]
            keys = [packed({1: packed({_VALUE: struct.pack("=I", index)})}) for index in some]
            self._change(_NEWSETELEM, {**where, 3: _list(keys)}, _CREATE)

    def commit(self, netns: Netns) -> None:
        """All of it or nothing; OSError is the kernel's word."""
        bracket = _FAMILY.pack(0, 0, socket.htons(_SUBSYSTEM))
        with NetlinkSocket(netns, _NETLINK_NETFILTER) as kernel:
            kernel.transact(
                [Message(_BEGIN, 0, bracket), *self._changes, Message(_END, 0, bracket)]
            )
        self._changes.clear()

    def flags(self, netns: Netns) -> int | None:
        """None if there is no such table."""
        with NetlinkSocket(netns, _NETLINK_NETFILTER) as kernel:
            try:
                answer = kernel.get(_kind(_GETTABLE), _body({1: _text(self.name)}))
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                return None
        return None if answer is None else _unpacked(_attributes(answer)[2])

    def rules(self, netns: Netns, chain: str) -> list[Attributes]:
        """The attributes of each rule, in their order."""
        return [
            found
            for found in self._dump(netns, _GETRULE, {1: _text(self.name), 2: _text(chain)})
            if found[1] == _text(self.name) and found[2] == _text(chain)
        ]

    def elements(self, netns: Netns, name: str) -> set[int]:
        """The devices in a set."""
        answers = self._dump(netns, _GETSETELEM, {1: _text(self.name), 2: _text(name)})
        keys = [
            attributes_of(attributes_of(element)[1])[_VALUE]
            for answer in answers
            for _, element in each_attribute(answer.get(3, b""))
        ]
        return {struct.unpack("=I", key)[0] for key in keys}

    def _dump(self, netns: Netns, kind: int, wanted: dict[int, bytes]) -> list[Attributes]:
        with NetlinkSocket(netns, _NETLINK_NETFILTER) as kernel:
            try:
                return [_attributes(a) for a in kernel.dump(_kind(kind), _body(wanted))]
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                return []

    def _change(self, kind: int, attributes: dict[int, bytes], flags: int = 0) -> None:
        self._changes.append(Message(_kind(kind), flags, _body(attributes)))

    def __repr__(self) -> str:
        return f"<Table inet {self.name}, {len(self._changes)} changes>"


def output_device_in(name: str) -> list[bytes]:
    """The packet leaves by a device of the set."""
    return [_meta(_OUTPUT_INDEX), _expression("lookup", {1: _text(name), 2: _REGISTER})]


def protocol(number: int, *, equal: bool) -> list[bytes]:
    """Its transport protocol can be told, and is this one, or another."""
    return [_meta(_L4PROTO), _compare(bytes([number]), equal=equal)]


def other_destination_port(port: int) -> list[bytes]:
    """It has its transport header, and is not for this port."""
    offset, length = _DESTINATION_PORT
    where = {2: _number(_TRANSPORT), 3: _number(offset), 4: _number(length)}
    loaded = _expression("payload", {1: _REGISTER, **where})
    return [loaded, _compare(struct.pack("!H", port), equal=False)]


def counter() -> bytes:
    return _expression("counter", {})


def packets_of(rule: Attributes) -> int:
    """How many a rule has counted that does nothing else."""
    data = attributes_of(attributes_of(attributes_of(rule[4])[_ELEMENT])[2])
    return int.from_bytes(data[2], "big")


def verdict(code: int) -> bytes:
    data = packed({2: packed({1: _number(code)})})  # NFTA_DATA_VERDICT, NFTA_VERDICT_CODE
    return _expression("immediate", {1: _VERDICT_REGISTER, 2: data})


def comment_data(comment: str) -> bytes:
    """As nft keeps it with a rule: type 0, length, text."""
    text = _text(comment)
    return bytes([0, len(text)]) + text


def _meta(key: int) -> bytes:
    return _expression("meta", {1: _REGISTER, 2: _number(key)})


def _compare(value: bytes, *, equal: bool) -> bytes:
    operator = _number(_EQUAL if equal else _UNEQUAL)
    return _expression("cmp", {1: _REGISTER, 2: operator, 3: packed({_VALUE: value})})


def _expression(name: str, data: dict[int, bytes]) -> bytes:
    return packed({1: _text(name), 2: packed(data)})


def _list(items: Iterable[bytes]) -> bytes:
    return b"".join(packed({_ELEMENT: item}) for item in items)


def _kind(kind: int) -> int:
    return _SUBSYSTEM << 8 | kind


def _body(attributes: dict[int, bytes]) -> bytes:
    return _FAMILY.pack(NFPROTO_INET, 0, 0) + packed(attributes)


def _attributes(answer: bytes) -> Attributes:
    return attributes_of(answer[_FAMILY.size :])


def _text(text: str) -> bytes:
    return text.encode() + b"\0"


def _number(value: int) -> bytes:
    return struct.pack("!I", value)


def _unpacked(number: bytes) -> int:
    return int.from_bytes(number, "big")
