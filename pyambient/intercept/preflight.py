"""What must hold before a pod is touched; each breach is one line that says what to do."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from typing import Final

from pyambient.errors import NeedsRoot, PyambientError, UnsupportedFeature, UsageError
from pyambient.model.numbers import ROUTE_TABLE
from pyambient.netns import Netns

from .fib import foreign
from .interface import Pod, Site, Step
from .iptables_tools import legacy_tables, tool
from .mounts import is_on
from .nf_tables import NFPROTO_UNSPEC, chains
from .nft_rules import TABLE
from .processes import named, processes_in
from .programs import run
from .survey import ipv6_devices
from .sysctl import read

_SIOCGIFFLAGS: Final = 0x8913
_IFF_UP: Final = 0x1
_LO_WITHOUT_IPV6: Final = "net.ipv6.conf.lo.disable_ipv6"
_NAMED_AT_MOST: Final = 5


def preflight(pod: Pod, site: Site, backend: str, recorded: Collection[Step] = ()) -> None:
    """Raise the PyambientError that keeps this pod from being enrolled with this backend.

    Nothing is changed. `recorded` is what an enrolment by another backend has added: that is not
    in the way.
    """
    if os.geteuid() != 0:
        raise NeedsRoot("enroll")
    _check_not_the_host(pod.netns)
    _check_loopback(pod.netns)
    if backend == "bpf":
        check_cgroup(pod.netns, site)
    _check_chains(pod.netns, backend, {step.kind.partition("-")[0] for step in recorded})
    _check_routing(pod.netns, recorded)


def _check_not_the_host(netns: Netns) -> None:
    if netns.key in _host_keys():
        raise UsageError(
            f"{netns.name} is the host's own network namespace",
            "give a pod's: list them with 'ip netns' or 'lsns -t net'",
        )


def _host_keys() -> Iterator[tuple[int, int]]:
    """Our own namespace, and the first process's where we may look at it (containers may not)."""
    with Netns.own() as own:
        yield own.key
    with contextlib.suppress(UsageError), Netns.open("pid:1") as first:
        yield first.key


def _check_loopback(netns: Netns) -> None:
    """Captured connections pass lo, whatever their destination."""
    request = struct.pack("16sH14x", b"lo", 0)
    with netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request)
    if not struct.unpack_from("16xH", answer)[0] & _IFF_UP:
        raise PyambientError(
            f"lo is down in {netns.name}", f"run 'ip -n {netns.name} link set lo up'"
        )
    if read(netns, _LO_WITHOUT_IPV6) == "1" and ipv6_devices(netns):
        raise PyambientError(
            f"{netns.name} has IPv6, but not on lo",
            f"run 'ip netns exec {netns.name} sysctl -w {_LO_WITHOUT_IPV6}=0'",
        )


def check_cgroup(netns: Netns, site: Site) -> None:
    """PyambientError unless `bpf` can serve this pod.

    The hooks see the sockets of a cgroup2 sub-tree; all apps of the pod must be in it.
    """
    if site.cgroup is None:
        raise PyambientError(
            "cgroup2 is not mounted",
            "run 'mount -t cgroup2 none DIR' and give --cgroup DIR, or use --backend iptables",
        )
    if not is_on(site.cgroup, "cgroup2"):
        raise UsageError(
            f"--cgroup {site.cgroup} is not a cgroup2 directory", "see 'mount -t cgroup2'"
        )
    inside = site.cgroup.resolve()
    outside = [
        process
        for process in processes_in(netns)
        if process.cgroup is None or not process.cgroup.is_relative_to(inside)
    ]
    if outside:
        raise PyambientError(
            f"processes of {netns.name} are outside --cgroup {site.cgroup}: {named(outside)}",
            "give a --cgroup that holds them too, or use --backend tc",
        )


def _check_chains(netns: Netns, backend: str, recorded: Collection[str]) -> None:
    """`recorded` holds the backends whose rules are there by a record of ours."""
    found = _foreign_chains(netns, backend, recorded)
    if "iptables" not in recorded:
        found += _foreign_legacy_chains(netns)
    if found:
        raise PyambientError(
            f"{netns.name} has rules of another mesh: {', '.join(found[:_NAMED_AT_MOST])}",
            "take it out of that mesh, or delete these chains",
        )


def _foreign_chains(netns: Netns, backend: str, recorded: Collection[str]) -> list[str]:
    """Istio's, whichever of its backends made them: iptables-nft, or its own nftables tables.

    Our own tables without a record are in the way of every backend but the one that replaces them.
    """
    try:
        present = chains(netns, NFPROTO_UNSPEC)
    except UnsupportedFeature:
        return []
    our_tables = backend == "nftables" or "nftables" in recorded
    return [
        f"{chain.table} {chain.name}"
        for chain in present
        if (chain.name.startswith("ISTIO_") and "iptables" not in recorded)
        or chain.table.startswith("istio-ambient-")
        or (chain.table == TABLE and not our_tables)
    ]


def _foreign_legacy_chains(netns: Netns) -> list[str]:
    found = []
    for ipv6 in (False, True):
        if legacy_tables(netns, ipv6=ipv6):
            saved = run(netns, tool("save", "legacy", ipv6=ipv6))
            chains = [line[1:].split()[0] for line in saved.splitlines() if line.startswith(":")]
            found += [f"legacy {name}" for name in chains if name.startswith("ISTIO_")]
    return found


def _check_routing(netns: Netns, recorded: Iterable[Step]) -> None:
    found = foreign(netns, recorded)
    if found:
        raise PyambientError(
            f"{netns.name} has {found[0]} that is not ours",
            f"table {ROUTE_TABLE} and its rule are needed: move what uses them to another table",
        )
