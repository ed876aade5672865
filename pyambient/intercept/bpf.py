"""The backend `bpf`: no netfilter, no connection tracking, no address translation.

General theory of operation
---------------------------
Outbound: a hook on connect() gives an app's socket the mark LOOPBACK_MARK. A rule and a route turn
the marked SYN back to lo with its true destination, and the pod's sk_lookup program hands it to
the listener on 15001; getsockname() there is the original destination.

Inbound: sk_lookup hands what comes from outside to 15008 or 15006. The proxy's connection to the
app has the client's address as its source, so the app's answers must not leave by the device: the
hook marks and binds that socket to lo, and tcp_fwmark_accept lets the app's accepted socket
inherit the mark. fwmark_reflect does the same for answers without a socket (the RST of a closed
port); without it such a connect would hang. sk_lookup must let that connection pass: it is what
came in by lo. Where the kernel does not tell it so (before 5.17), a filter on lo does.

What the hook judged is also noted on the socket, where the app cannot change it: a guard on each
device lets out TCP of the proxy, of what is excluded and of connections from before the enrolment,
so that an app that changes its mark later, or writes its packets itself, sends nothing.

The proxy is whoever made its sockets in the proxy's own cgroup. No mark says so: any container
with the default capabilities can set one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from pyambient.errors import PyambientError

from .bpf_steps import (
    CapturedDevice,
    DnsGate,
    DnsSlots,
    Gate,
    LoopbackNote,
    NodeStep,
    OwnAddress,
    SkLookup,
    moved_ports,
)
from .fib import Route, SlotRoute, delivery
from .guards import guards
from .interface import Plan, Pod, PodNetwork, Site, Step
from .listeners import ProxyListeners, WorkerCount
from .loader import Constants
from .netns_cookie import netns_cookie
from .options import DEFAULTS, CaptureOptions
from .selection_map import selection_entries
from .sysctl import Sysctl, reserved

FOR_ANSWERS = ("net.ipv4.tcp_fwmark_accept", "net.ipv4.fwmark_reflect")
FOR_ANSWERS_IPV6 = ("net.ipv6.fwmark_reflect",)


class Bpf:
    """Plans captures by BPF programs; `constants` tells them what this kernel can do."""

    name: ClassVar[str] = "bpf"

    def __init__(self, site: Site, constants: Constants) -> None:
        if site.cgroup is None:
            raise PyambientError(
                "cgroup2 is not mounted",
                "run 'mount -t cgroup2 none DIR' and give --cgroup DIR, or use --backend iptables",
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
        if options.devices:
            raise PyambientError(
                f"backend {self.name} does not see what others send by {options.devices[0]}",
                "use --backend tc, nftables or iptables",
            )
        cookie = netns_cookie(pod.netns, self._cgroup)
        by_ifindex = self._constants.has_ingress_ifindex
        own = dict.fromkeys(address.ip for address in network.addresses + network.tentative)
        routing = delivery(network, connects=True)
        routes = [step for step in routing if isinstance(step, Route)]
        sysctls = FOR_ANSWERS + (FOR_ANSWERS_IPV6 if network.has_ipv6 else ())
        # An address in the map has the proxy's SYNs to it marked: what delivers the answers comes
        # before it, and is undone after it.
        steps: tuple[Step, ...] = (
            NodeStep(
                *(self._bpffs, str(self._cgroup), by_ifindex, self._constants.has_set_retval),
                *(str(self._probe_cgroup), self._constants.node),
            ),
            *moved_ports(self._bpffs, cookie, network.ports),
            *reserved(network.ports),
            *(Sysctl(name, "1") for name in sysctls),
            *routing,
            WorkerCount(self._bpffs, cookie),
            *(OwnAddress(self._bpffs, cookie, ip) for ip in own),
            *(_dns(self._bpffs, cookie, routes) if options.dns else ()),
            *(
                CapturedDevice(self._bpffs, cookie, r.ipv6, r.device, r.source, r.metric)
                for r in routes
            ),
            *selection_entries(self._bpffs, cookie, options),
            *(() if by_ifindex else (LoopbackNote(self._bpffs, cookie),)),
            ProxyListeners(self._bpffs, str(self._cgroup), cookie, tuple(network.ports)),
            SkLookup(self._bpffs, cookie),
            *((DnsGate(self._bpffs, cookie),) if options.dns else ()),
            Gate(self._bpffs, cookie),
            *guards(self._bpffs, cookie, network, options),
        )
        return Plan(self.name, network, steps)

    def __repr__(self) -> str:
        return f"<Bpf on {self._cgroup}, pins in {self._bpffs}>"


def _dns(bpffs: str, cookie: int, routes: Iterable[Route]) -> tuple[Step, ...]:
    """What DNS needs besides its gate; a device that is said to capture does so for DNS, too."""
    slots = (SlotRoute(r.ipv6, r.device, r.source, r.metric) for r in routes)
    return (DnsSlots(bpffs, cookie), *slots)
