"""Everything that an enrolment may leave in the kernel, as one comparable value."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pyambient.model.numbers import RESERVED_PORTS, ROUTE_TABLE

from .bpf import CGROUP_TYPES, NETNS_TYPES, attached, pins
from .network import Bed, BedPod, command

_SYSCTLS = (
    "net.ipv4.tcp_fwmark_accept",
    "net.ipv4.fwmark_reflect",
    "net.ipv6.fwmark_reflect",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_forward",
    "net.ipv4.conf.all.route_localnet",
    "net.ipv4.conf.all.rp_filter",
    "net.ipv4.conf.lo.accept_local",
)
# Packets counted by a chain's policy are no change of anything.
_UNCOUNTED = r"sed 's/ \[[0-9]*:[0-9]*\]$//'"
# Nor is a connection that waits to be accepted.
_UNQUEUED = "awk '{ $3 = \"\" } 1'"
_OURS_BY_PORT = " or ".join(f"sport = :{port}" for port in RESERVED_PORTS)
_OF_BOTH = {
    "rules": "ip -4 rule show; ip -6 rule show",
    "listeners": f"ss -Hltun {_OURS_BY_PORT} | {_UNQUEUED}",
    "nft": "nft -s list ruleset",
    "iptables": f"iptables-legacy-save | {_UNCOUNTED}; ip6tables-legacy-save | {_UNCOUNTED}",
}
_OF_PODS = _OF_BOTH | {
    "addresses": "ip -o addr show scope global; ip -o addr show scope host",
    "routes": "ip -4 route show table all; ip -6 route show table all",
    "qdiscs": "tc qdisc show",
}
# The node's own routes and devices change with every pod that the bed makes.
_OURS = f"sed -n '/ table {ROUTE_TABLE} /p'"
_OF_NODE = _OF_BOTH | {
    "routes": f"ip -4 route show table all | {_OURS}; ip -6 route show table all | {_OURS}"
}


def kernel_state(*pods: BedPod) -> dict[str, Any]:
    """State of the node and of each pod: two are equal when nothing was left behind."""
    bed = pods[0].bed
    state = {pod.name: _namespace_state(pod, _OF_PODS) for pod in pods}
    state["node"] = _namespace_state(bed.node, _OF_NODE)
    state["node"] |= {"cgroup programs": _cgroup_programs(bed), "pins": pins()}
    return state


def changes(before: Any, after: Any, path: str = "") -> list[str]:
    """What to read when two snapshots differ: a line with - or + for each thing gone or added."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for key in {**before, **after}
            for line in changes(before.get(key), after.get(key), f"{path}/{key}")
        ]
    if isinstance(before, list) and isinstance(after, list):
        gone, added = Counter(before) - Counter(after), Counter(after) - Counter(before)
        return [
            *(f"{path} - {line}" for line in gone.elements()),
            *(f"{path} + {line}" for line in added.elements()),
        ]
    return [] if before == after else [f"{path} - {before}", f"{path} + {after}"]


def without_devices(state: Any, devices: Collection[str]) -> Any:
    """A snapshot without the lines about `devices`, which came after the one it is compared to."""
    if isinstance(state, dict):
        return {key: without_devices(value, devices) for key, value in state.items()}
    if isinstance(state, list):
        return [line for line in state if not set(devices) & set(line.split())]
    return state


def _namespace_state(pod: BedPod, commands: Mapping[str, str]) -> dict[str, Any]:
    return dict(pod.run(_gather, pod.netns.fd, commands, uid=0, gid=0))


def _gather(netns: int, commands: Mapping[str, str]) -> dict[str, Any]:
    """Runs in the pod."""
    return {
        **{name: _lines(line) for name, line in commands.items()},
        "sysctls": {name: _read(Path("/proc/sys") / name.replace(".", "/")) for name in _SYSCTLS},
        "programs": attached(netns, NETNS_TYPES),
    }


def _lines(line: str) -> list[str]:
    """Sorted output, without counters, of the commands that this machine has."""
    known = [part for part in line.split("; ") if shutil.which(part.split()[0])]
    output = command("sh", "-ec", "; ".join(known) or ":")
    return sorted(line for line in output.splitlines() if not _is_noise(line))


def _is_noise(line: str) -> bool:
    """Comments with dates, and the kernel's own link-local routes, which come when they come."""
    return line.startswith("#") or ("fe80:" in line and "proto kernel" in line)


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else "absent"


def _cgroup_programs(bed: Bed) -> dict[str, dict[int, int]]:
    found = {}
    for directory in bed.cgroup.directories():
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if programs := attached(fd, CGROUP_TYPES):
                found[directory.name] = programs
        finally:
            os.close(fd)
    return found
