"""The netfilter backends and the kernels that tests hold for, each of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyambient.errors import UnsupportedFeature
from pyambient.intercept import probe
from pyambient.intercept.interface import Interceptor
from pyambient.intercept.loader import Constants
from pyambient.netns import Netns
from tests.bed import Bed, BedPod, CgroupTree, Network
from tests.bed.network import command

from .netfilter_mesh import INTERCEPTORS


@pytest.fixture(params=["nftables", "iptables-nft"])
def interceptor(request: pytest.FixtureRequest) -> Interceptor:
    """The backend under test."""
    return INTERCEPTORS[request.param]


@pytest.fixture
def masqueraded(bed: Bed) -> Iterator[BedPod]:
    """A pod in another network, whose connections reach the others from the node's address."""
    network = bed.add_network(Network("br79", "10.79.0", "fd79::"))
    bed.node.command(
        "sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"
    )
    rules = "chain post { type nat hook postrouting priority srcnat; oifname br77 masquerade; }"
    for family in ("ip", "ip6"):
        command("nft", "-f", "-", text=f"table {family} masquerading {{ {rules}; }}\n")
    yield bed.pod("masqueraded", network=network)
    for family in ("ip", "ip6"):
        command("nft", "delete", "table", family, "masquerading")


@pytest.fixture(params=["this kernel", "as Linux 5.10"])
def kernel(
    request: pytest.FixtureRequest, cgroup_tree: CgroupTree, monkeypatch: pytest.MonkeyPatch
) -> Constants:
    """What BPF programs are told of the kernel: the truth, or that it has just what 5.10 has.

    All that stands in for what is missing then works on every later kernel as well.
    """
    if request.param == "as Linux 5.10":
        monkeypatch.setattr(probe, "constants", _of_linux_5_10)
        monkeypatch.setattr(Netns, "cookie", _no_cookie)
    return probe.constants(cgroup_tree.path)


def _of_linux_5_10(cgroup: Path) -> Constants:
    return Constants(node=probe.node_cookie(cgroup))


def _no_cookie(netns: Netns) -> int:
    raise UnsupportedFeature("SO_NETNS_COOKIE", "5.14")
