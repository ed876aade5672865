"""The ways to intercept a pod's traffic, and the two kinds of them."""

from __future__ import annotations

from typing import Final

# In the order in which "auto" prefers them.
BACKENDS: Final = ("bpf", "tc", "nftables", "iptables")
# BPF programs know the proxy's sockets by its cgroup, and sk_lookup steers.
WITH_PROGRAMS: Final = ("bpf", "tc")
# Rules redirect, and conntrack knows where a connection wanted to go.
NETFILTER: Final = ("nftables", "iptables")
