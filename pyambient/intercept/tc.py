"""The backend `tc`: capture where packets leave the pod, for apps that no cgroup hook sees.

General theory of operation
---------------------------
Nested container runtimes and virtual machines run their apps outside of the node's cgroup2 tree,
or without sockets in the pod's namespace at all. What all of their packets have in common is the
pod's device. A program at its egress sends captured segments back in by lo, with LOOPBACK_MARK;
rule, route and sk_lookup then do for them what they do with `bpf`. They arrive as they were sent:
the listener's getsockname() is the original destination.

DNS over UDP goes the same way, to port 15053 instead of 53: the address it arrives for is the
resolver's, and needs no translation. The proxy answers from there, with LOOPBACK_MARK, so that its
answers come by lo; there the port becomes 53 again. A query that would not reach the proxy is
dropped on lo.

No program sees what leaves by a device that has come since; a fence holds that back (`fence`).

The proxy's own processes are the node's, so hooks on its cgroup tell its sockets and its listeners,
and make its connections to apps the way `bpf` does: the redirect has no mark to trust. Inbound
capture is that of `bpf`.

lo has to take packets whose source is the pod's own address (accept_local) and answers to forwarded
connections, whose source is anybody's: rp_filter 2, as the larger of this and `all` counts, and 1
would drop both. A pod that forwards must not look for a local socket before it routes a packet
(early demux): it would find the proxy's, and the kernel forwards nothing that has a socket.
"""

from __future__ import annotations

from typing import ClassVar

from pyambient.errors import UnsupportedFeature
from pyambient.netns import Netns

from .bpf import FOR_ANSWERS, FOR_ANSWERS_IPV6
from .bpf_steps import LoopbackNote, OwnAddress, SkLookup, moved_ports
from .fence import fence
from .fib import delivery
from .guards import guards
from .interface import Plan, Pod, PodNetwork, Site, Step
from .listeners import ProxyListeners, WorkerCount
from .loader import Constants
from .netns_cookie import netns_cookie
from .options import DEFAULTS, CaptureOptions
from .selection_map import selection_entries
from .sysctl import Sysctl, read, reserved
from .tc_steps import Arrival, ProxyStep, Redirect, RedirectDnsGate, RedirectGate

_FOR_ARRIVALS = (
    Sysctl("net.ipv4.conf.lo.accept_local", "1"),
    Sysctl("net.ipv4.conf.lo.rp_filter", "2"),
)
_FOR_FORWARDING = (Sysctl("net.ipv4.tcp_early_demux", "0"),)  # of both families
_FORWARDS = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")


class Tc:
    """Plans captures at a pod's devices; `constants` tells programs what this kernel can do."""

    name: ClassVar[str] = "tc"

    def __init__(self, site: Site, constants: Constants) -> None:
        """UnsupportedFeature where cgroup2 is missing, by which the proxy is known."""
        if site.cgroup is None:
            raise UnsupportedFeature(
                "cgroup2", "4.5", "mount it ('mount -t cgroup2 none DIR') and give --cgroup DIR"
            )
        self._bpffs = str(site.bpffs)
        self._cgroup = site.cgroup
        self._probe_cgroup = site.probe_cgroup or site.cgroup
        self._constants = constants

    def plan(
        self,
        pod: Pod,
        network: PodNetwork,
        options: CaptureOptions = DEFAULTS,
    ) -> Plan:
        bpffs, cookie = self._bpffs, netns_cookie(pod.netns, self._cgroup)
        by_ifindex = self._constants.has_ingress_ifindex
        own = dict.fromkeys(address.ip for address in network.addresses + network.tentative)
        answers = FOR_ANSWERS + (FOR_ANSWERS_IPV6 if network.has_ipv6 else ())
        steps: tuple[Step, ...] = (
            ProxyStep(
                *(bpffs, str(self._cgroup), by_ifindex, self._constants.has_set_retval),
                *(str(self._probe_cgroup), self._constants.node),
            ),
            *moved_ports(bpffs, cookie, network.ports),
            *reserved(network.ports),
            *(Sysctl(name, "1") for name in answers),
            *_FOR_ARRIVALS,
            *delivery(network, connects=False),
            WorkerCount(bpffs, cookie),
            *(OwnAddress(bpffs, cookie, ip) for ip in own),
            *(_FOR_FORWARDING if _forwards(pod.netns) else ()),
            Arrival(bpffs, "lo", cookie),
            *(Redirect(bpffs, device, cookie) for device in network.devices),
            *selection_entries(bpffs, cookie, options),
            *(() if by_ifindex else (LoopbackNote(bpffs, cookie),)),
            ProxyListeners(bpffs, str(self._cgroup), cookie, tuple(network.ports)),
            SkLookup(bpffs, cookie),
            *((RedirectDnsGate(bpffs, cookie),) if options.dns else ()),
            RedirectGate(bpffs, cookie),
            *guards(bpffs, cookie, network, options),
            *fence(bpffs, cookie, network, options),
        )
        return Plan(self.name, network, steps)

    def __repr__(self) -> str:
        return f"<Tc beside {self._cgroup}, pins in {self._bpffs}>"


def _forwards(netns: Netns) -> bool:
    """Whether the pod forwards now; looked at again when its devices or addresses change."""
    return any(read(netns, name) not in (None, "0") for name in _FORWARDS)
