"""What nf_tables holds in a pod, by nfnetlink: the tool `nft` may not be installed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from pyroute2.netlink import NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFT_MSG_DELCHAIN,
    NFT_MSG_DELTABLE,
    nft_chain_msg,
    nft_table_msg,
)
from pyroute2.nftables.main import NFTables

from pyambient.errors import UnsupportedFeature
from pyambient.netns import Netns

NFPROTO_UNSPEC: Final = 0
NFPROTO_IPV4: Final = 2
NFPROTO_IPV6: Final = 10
_NLM_F_NONREC: Final = 0x100
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
        if error.errno in _ABSENT:
            raise UnsupportedFeature("nf_tables", "3.13", "use iptables-legacy") from None
        raise


def tables(netns: Netns, family: int) -> list[str]:
    """The names of the family's tables."""
    with _nfnetlink(netns, family) as kernel:
        return [message.get_attr("NFTA_TABLE_NAME") for message in kernel.get_tables()]


def chains(netns: Netns, family: int) -> list[Chain]:
    """The chains of one family, or of all (NFPROTO_UNSPEC)."""
    with _nfnetlink(netns, family) as kernel:
        return [
            Chain(m["nfgen_family"], m.get_attr("NFTA_CHAIN_TABLE"), m.get_attr("NFTA_CHAIN_NAME"))
            for m in kernel.get_chains()
        ]


def delete_if_empty(
    netns: Netns, family: int, table: str, chains: Iterable[str], *, with_table: bool
) -> None:
    """Delete these chains, and the table, if nothing is in them; else all of them stay.

    The kernel judges that (NLM_F_NONREC). It is one transaction, because each one that deletes
    makes the kernel wait a grace period, around 16 ms.
    """
    with _nfnetlink(netns, family) as kernel:
        kernel.begin()
        for name in chains:
            where = [("NFTA_CHAIN_TABLE", table), ("NFTA_CHAIN_NAME", name)]
            _put(kernel, NFT_MSG_DELCHAIN, nft_chain_msg(), where)
        if with_table:
            _put(kernel, NFT_MSG_DELTABLE, nft_table_msg(), [("NFTA_TABLE_NAME", table)])
        kernel.commit()


def _put(kernel: Any, kind: int, message: Any, attributes: list[tuple[str, str]]) -> None:
    message["attrs"] = attributes
    kernel.request_put(message, kind, NLM_F_REQUEST | _NLM_F_NONREC)
