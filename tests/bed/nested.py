"""A network namespace behind a pod: what nested container runtimes and virtual machines make."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pyambient.netns import Netns

from .network import BedPod, command

_IPV4, _IPV6 = "10.99.0", "fd99::"


@contextlib.contextmanager
def nested(pod: BedPod, *, masquerade: bool = False) -> Iterator[BedPod]:
    """A namespace whose only way out is by `pod`, which forwards for it.

    With `masquerade` it leaves under the pod's own address, as containers of a container do;
    without, whoever shall answer it needs a route to it (`route_to`).
    """
    name = f"{pod.name}-nested"
    command("ip", "netns", "add", name)
    inner = BedPod(pod.bed, name, Netns.open(name), f"{_IPV4}.2", f"{_IPV6}2")
    pod.bed.pods[name] = inner
    try:
        _join(pod, inner)
        if masquerade:
            pod.command("nft", "-f", "-", text=_MASQUERADE)
        yield inner
    finally:
        pod.ip("link del inner")
        if masquerade:
            pod.command("nft", "delete", "table", "inet", "nat")
        pod.bed.remove_pod(inner)


def route_to(inner: BedPod, outside: BedPod, by: BedPod) -> None:
    """Let `outside` reach what is behind the pod `by`."""
    outside.ip(
        f"route add {inner.address('v4')}/32 via {by.address('v4')}",
        f"route add {inner.address('v6')}/128 via {by.address('v6')}",
    )


_MASQUERADE = """
table inet nat {
    chain postrouting {
        type nat hook postrouting priority srcnat
        oifname "eth0" masquerade
    }
}
"""


def _join(pod: BedPod, inner: BedPod) -> None:
    inner.command("sysctl", "-q", "-w", "net.ipv6.conf.default.accept_dad=0")
    pod.ip(f"link add inner type veth peer name eth0 netns {inner.name}")
    pod.ip("link set inner up", f"addr add {_IPV4}.1/24 dev inner")
    pod.ip(f"addr add {_IPV6}1/64 dev inner nodad")
    inner.ip(
        "link set lo up",
        "link set eth0 up",
        f"addr add {_IPV4}.2/24 dev eth0",
        f"addr add {_IPV6}2/64 dev eth0 nodad",
        f"route add default via {_IPV4}.1",
        f"route add ::/0 via {_IPV6}1",
    )
    pod.command("sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
