"""What is in a pod's network namespace: the devices and addresses that decide its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pyambient.model.address import canonical_ip, is_loopback
from pyambient.netns import Netns

from .interface import PodAddress, PodNetwork
from .rtnetlink import routing

_UP = 0x1  # IFF_UP
_OPTIMISTIC, _DAD_FAILED, _DEPRECATED, _TENTATIVE = 0x04, 0x08, 0x20, 0x40  # IFA_F_*
_IPV6_CONF = Path("/proc/sys/net/ipv6/conf")


class _Found(NamedTuple):
    """An address of the namespace, and what the kernel says of it."""

    address: PodAddress
    flags: int

    @property
    def tentative(self) -> bool:
        # An optimistic address (RFC 4429) works while its detection goes on.
        return bool(self.flags & _TENTATIVE) and not self.flags & _OPTIMISTIC


def survey(netns: Netns) -> PodNetwork:
    """The network of a pod as it is now.

    Devices that are down are left out with their addresses: the kernel takes no route by them,
    and delivers to none of these addresses. An address that duplicate address detection refused
    is left out as well; one that it has not finished with is listed apart.
    """
    with routing(netns) as kernel:
        links = kernel.get_links()
        messages = kernel.get_addr()
    up = {m["index"]: m.get_attr("IFLA_IFNAME") for m in links if m["flags"] & _UP}
    found = [_read(m, up[m["index"]]) for m in messages if m["index"] in up]
    usable = [f for f in found if not f.flags & _DAD_FAILED and not is_loopback(f.address.ip)]
    # Stable: within a family and device, in the kernel's order, deprecated addresses last.
    usable.sort(key=lambda f: bool(f.flags & _DEPRECATED))
    ipv6 = ipv6_devices(netns)
    devices = tuple(name for _, name in sorted(up.items()) if name != "lo")
    return PodNetwork(
        addresses=tuple(f.address for f in usable if not f.tentative),
        devices=devices,
        has_ipv6=bool(ipv6),
        ipv4_only=tuple(name for name in devices if name not in ipv6),
        tentative=tuple(f.address for f in usable if f.tentative),
    )


def _read(message: Any, device: str) -> _Found:
    # On a point-to-point device IFA_ADDRESS is the peer and IFA_LOCAL is ours.
    ip = canonical_ip(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
    if ip.startswith("fe80:"):
        ip = f"{ip}%{message['index']}"
    flags = message.get_attr("IFA_FLAGS") or message["flags"]
    return _Found(PodAddress(ip, device), flags)


def ipv6_devices(netns: Netns) -> frozenset[str]:
    """The devices with IPv6 turned on; none where the kernel has no IPv6."""
    with netns.entered():
        switches = {p.parent.name: p.read_text() for p in _IPV6_CONF.glob("*/disable_ipv6")}
    pseudo = {"all", "default", "lo"}
    return frozenset(n for n, off in switches.items() if off.strip() == "0" and n not in pseudo)
