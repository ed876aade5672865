"""What an enrolment adds, read out by tools that are not pyambient's, to see that it is gone."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .bed import Pod

_SYSCTLS = (
    "/proc/sys/net/ipv4/tcp_fwmark_accept",
    "/proc/sys/net/ipv4/fwmark_reflect",
    "/proc/sys/net/ipv6/fwmark_reflect",
    "/proc/sys/net/ipv4/ip_local_reserved_ports",
    "/proc/sys/net/ipv4/conf/all/route_localnet",
)
_QUESTIONS = {
    "rules": (("ip", "-4", "rule"), ("ip", "-6", "rule")),
    "routes": (
        ("ip", "-4", "route", "show", "table", "all"),
        ("ip", "-6", "route", "show", "table", "all"),
    ),
    "addresses": (("ip", "-brief", "address"),),
    "sysctls": (("grep", "-H", "", *_SYSCTLS),),
    "nftables and iptables-nft": (("nft", "list", "ruleset"),),
    # The kernel has these files once a legacy table was asked for.
    "iptables-legacy": (("sh", "-c", "cat /proc/net/ip*_tables_names 2>/dev/null || :"),),
    "listening sockets": (("ss", "-Hltun"),),
}

State = dict[str, str]


def of_pod(pod: Pod) -> State:
    """Everything in the pod's network namespace that an enrolment may touch."""
    return {
        what: "".join(_inside(pod, *command) for command in commands)
        for what, commands in _QUESTIONS.items()
    }


def _inside(pod: Pod, *command: str) -> str:
    """What `command` prints in the pod's network namespace, as root."""
    enter = ["nsenter", f"--net=/run/netns/{pod.name}"]
    return subprocess.run([*enter, *command], capture_output=True, text=True, check=True).stdout


def of_node(cgroup: Path) -> State:
    """The bpffs and the cgroup sub-tree, by the names of all that is in them."""
    return {
        "bpffs": _names(Path("/sys/fs/bpf")),
        "cgroups": _names(cgroup, folders_only=True),
    }


def _names(top: Path, *, folders_only: bool = False) -> str:
    found = (path for path in top.rglob("*") if path.is_dir() or not folders_only)
    return "\n".join(sorted(map(str, found)))


def changes(before: State, after: State) -> list[str]:
    """What of the state is not as it was."""
    return [what for what in before if before[what] != after[what]]


def told(before: State, after: State) -> str:
    """The changes for people; empty if there are none."""
    return "\n".join(
        f"{what} were:\n{before[what]}\nand are:\n{after[what]}" for what in changes(before, after)
    )
