"""The test bed: pods, apps and a mesh in namespaces of the test session's own.

General theory of operation
---------------------------
`tests/conftest.py` moves the pytest process into mount and network namespaces of its own, before
anything else (`isolation`). Its network namespace is "the node"; a `Bed` makes a bridge there and
pods on it, a cgroup2 sub-tree (`cgroup`) holds all that a test starts. `BedPod.run` and `spawn`
call a function of the test in a pod, as an unprivileged user (`process`, `privileges`); `apps` has
the usual ones. `Mesh` is the real `pyambient up`, `NullProxy` a stand-in for its proxy alone.
What a test believes comes from outside of what it tests: `Capture` from the wire, `kernel_state`
from the kernel, `nobpf` from a kernel that has no bpf(2).
"""

from __future__ import annotations

from .apps import Accepted, ClientOptions, Exchange
from .capture import Capture, Packet, capturing
from .cgroup import CgroupTree
from .features import IPPROTO_MPTCP, has_mptcp, marking
from .mesh import Mesh
from .network import Bed, BedPod, Network, Twin
from .nullproxy import Interception, NullProxy
from .privileges import Capability
from .process import Channel, Child, ChildDied, is_gone
from .seccomp import forbid_bpf, nobpf
from .snapshot import changes, kernel_state

__all__ = [
    "IPPROTO_MPTCP",
    "Accepted",
    "Bed",
    "BedPod",
    "Capability",
    "Capture",
    "CgroupTree",
    "Channel",
    "Child",
    "ChildDied",
    "ClientOptions",
    "Exchange",
    "Interception",
    "Mesh",
    "Network",
    "NullProxy",
    "Packet",
    "Twin",
    "capturing",
    "changes",
    "forbid_bpf",
    "has_mptcp",
    "is_gone",
    "kernel_state",
    "marking",
    "nobpf",
]
