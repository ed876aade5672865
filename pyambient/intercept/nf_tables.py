"""What nf_tables holds in a pod, read and deleted by nfnetlink: `nft` may not be installed."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFT_MSG_DELCHAIN,
    NFT_MSG_DELRULE,
    NFT_MSG_DELTABLE,
    NFT_MSG_GETRULE,
    nft_chain_msg,
    nft_rule_msg,
    nft_table_msg,
)
from pyroute2.nftables.main import NFTables

from pyambient.errors import UnsupportedFeature
from pyambient.netns import Netns

from .netlink_socket import NetlinkSocket, attributes_of

NFPROTO_UNSPEC: Final = 0
NFPROTO_IPV4: Final = 2
NFPROTO_IPV6: Final = 10
DORMANT: Final = 1  # NFT_TABLE_F_DORMANT: its chains are off
_NLM_F_NONREC: Final = 0x100
_BEGIN, _END = 0x10, 0x11  # NFNL_MSG_BATCH_BEGIN and _END
_NETLINK_NETFILTER: Final = 12
_GETCHAIN: Final = NFNL_SUBSYS_NFTABLES << 8 | 4
_CHAIN_TABLE, _CHAIN_NAME = 1, 3  # NFTA_CHAIN_*
_FAMILY: Final = struct.Struct("=BBH")  # nfgenmsg
# What a kernel without nf_tables answers, or without nfnetlink altogether.
_ABSENT: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT})


class Chain(NamedTuple):
    """A chain of a table; `family` is NFPROTO_IPV4, NFPROTO_IPV6 or another (1 is inet)."""

    family: int
    table: str
    name: str


@contextlib.contextmanager
def _nfnetlink(netns: Netns, family: int) -> Iterator[Any]:
    """A socket for one family; UnsupportedFeature where the kernel has no nf_tables."""
    try:
        with netns.entered():
            kernel = NFTables(nfgen_family=family)
        try:
            yield kernel
        except NetlinkError as error:
            raise OSError(error.code, os.strerror(error.code)) from None
        finally:
            kernel.close()
    except OSError as error:
        raise _absent(error) from None


def _absent(error: OSError) -> Exception:
    if error.errno in _ABSENT:
        return UnsupportedFeature("nf_tables", "3.13", "use iptables-legacy")
    return error


def tables(netns: Netns, family: int) -> dict[str, int]:
    """The family's tables: {name: flags}."""
    with _nfnetlink(netns, family) as kernel:
        return {
            message.get_attr("NFTA_TABLE_NAME"): message.get_attr("NFTA_TABLE_FLAGS")
            for message in kernel.get_tables()
        }


def chains(netns: Netns, family: int) -> list[Chain]:
    """The chains of one family, or of all (NFPROTO_UNSPEC)."""
    try:
        with NetlinkSocket(netns, _NETLINK_NETFILTER) as kernel:
            answers = kernel.dump(_GETCHAIN, _FAMILY.pack(family, 0, 0))
    except OSError as error:
        raise _absent(error) from None
    return [_chain(answer) for answer in answers]


def _chain(answer: bytes) -> Chain:
    family, *_ = _FAMILY.unpack_from(answer)
    found = attributes_of(answer[_FAMILY.size :])
    table, name = (os.fsdecode(found[kind].rstrip(b"\0")) for kind in (_CHAIN_TABLE, _CHAIN_NAME))
    return Chain(family, table, name)


def comments(netns: Netns, family: int, table: str) -> dict[str, list[str]]:
    """The comment of each rule ("" where it has none), in order: {chain: [comment, ...]}."""
    asked = nft_rule_msg()
    asked["attrs"] = [("NFTA_RULE_TABLE", table)]
    found: dict[str, list[str]] = {}
    with _nfnetlink(netns, family) as kernel:
        for message in kernel.request_get(asked, NFT_MSG_GETRULE):
            comment = message.get_attr("NFTA_RULE_USERDATA")
            rules = found.setdefault(message.get_attr("NFTA_RULE_CHAIN"), [])
            rules.append(comment or "")
    return found


def delete_if_empty(
    netns: Netns, family: int, table: str, chains: Iterable[str], *, with_table: bool
) -> None:
    """Delete these chains, and the table, if nothing is in them; else all of them stay.

    The kernel judges that (NLM_F_NONREC).
    """
    messages = [_chain_deletion(Chain(family, table, name)) for name in chains]
    if with_table:
        messages.append(_table_deletion(family, table, _NLM_F_NONREC))
    _transact(netns, messages, noraise=True)


def flush(netns: Netns, these: Iterable[Chain]) -> None:
    """Delete all rules of these chains, as far as they are there."""
    present = set(chains(netns, NFPROTO_UNSPEC))
    _transact(netns, [_rules_deletion(chain) for chain in these if chain in present])


def delete_rule(netns: Netns, chain: Chain, comment: str) -> None:
    """Delete the rules of a chain that have this comment, as far as there are any."""
    asked = nft_rule_msg()
    asked["attrs"] = [("NFTA_RULE_TABLE", chain.table), ("NFTA_RULE_CHAIN", chain.name)]
    with _nfnetlink(netns, chain.family) as kernel:
        handles = [
            message.get_attr("NFTA_RULE_HANDLE")
            for message in kernel.request_get(asked, NFT_MSG_GETRULE)
            if message.get_attr("NFTA_RULE_USERDATA") == comment
        ]
    _transact(netns, [_rule_deletion(chain, handle) for handle in handles])


def delete_tables(netns: Netns, families: Iterable[int], table: str) -> None:
    """Delete the table of each family and all that is in it, as far as it is there."""
    present = [family for family in families if table in tables(netns, family)]
    _transact(netns, [_table_deletion(family, table) for family in present])


def _chain_deletion(chain: Chain) -> Any:
    where = [("NFTA_CHAIN_TABLE", chain.table), ("NFTA_CHAIN_NAME", chain.name)]
    return _message(nft_chain_msg(), NFT_MSG_DELCHAIN, chain.family, where, _NLM_F_NONREC)


def _rules_deletion(chain: Chain) -> Any:
    where = [("NFTA_RULE_TABLE", chain.table), ("NFTA_RULE_CHAIN", chain.name)]
    return _message(nft_rule_msg(), NFT_MSG_DELRULE, chain.family, where)


def _rule_deletion(chain: Chain, handle: int) -> Any:
    message = _rules_deletion(chain)
    message["attrs"].append(("NFTA_RULE_HANDLE", handle))
    return message


def _table_deletion(family: int, table: str, flags: int = 0) -> Any:
    where = [("NFTA_TABLE_NAME", table)]
    return _message(nft_table_msg(), NFT_MSG_DELTABLE, family, where, flags)


def _message(
    message: Any, kind: int, family: int, attributes: list[tuple[str, str]], flags: int = 0
) -> Any:
    message["header"]["type"] = NFNL_SUBSYS_NFTABLES << 8 | kind
    message["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK | flags
    message["nfgen_family"] = family
    message["attrs"] = attributes
    return message


def _transact(netns: Netns, messages: list[Any], *, noraise: bool = False) -> None:
    """All of these or none, and an error only if wanted.

    It is one transaction, because each one that deletes makes the kernel wait a grace period,
    around 16 ms.
    """
    if not messages:
        return
    with _nfnetlink(netns, NFPROTO_UNSPEC) as kernel:
        kernel.nlm_request_batch([_bracket(_BEGIN), *messages, _bracket(_END)], noraise=noraise)


def _bracket(kind: int) -> Any:
    message = nfgen_msg()
    message["header"]["type"] = kind
    message["header"]["flags"] = NLM_F_REQUEST
    message["res_id"] = NFNL_SUBSYS_NFTABLES
    return message
