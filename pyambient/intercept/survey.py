"""What is in a pod's network namespace: the devices and addresses that decide its plan."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pyambient.model.address import canonical_ip, is_loopback
from pyambient.netns import Netns

from .interface import PodAddress, PodNetwork
from .route_socket import Address
from .rtnetlink import routes

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
    with routes(netns) as kernel:
        links = kernel.links()
        addresses = kernel.addresses()
    up = {link.device: link.name for link in links if link.flags & _UP}
    found = [_read(address, up[address.device]) for address in addresses if address.device in up]
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


def _read(address: Address, device: str) -> _Found:
    ip = canonical_ip(address.ip)
    if ip.startswith("fe80:"):
        ip = f"{ip}%{address.device}"
    return _Found(PodAddress(ip, device), address.flags)


def ipv6_devices(netns: Netns) -> frozenset[str]:
    """The devices with IPv6 turned on; none where the kernel has no IPv6."""
    with netns.entered():
        switches = {p.parent.name: p.read_text() for p in _IPV6_CONF.glob("*/disable_ipv6")}
    pseudo = {"all", "default", "lo"}
    return frozenset(n for n, off in switches.items() if off.strip() == "0" and n not in pseudo)
