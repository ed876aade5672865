"""Pods, and the bridges that join them.

The node is the pytest process's own network namespace. A `Network` is a bridge in it; a `BedPod`
is a named network namespace with a veth on the bridge. Addresses count up from .2 in the order of
creation, so that a test can write them down.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pyambient.netns import CLONE_NEWNET, Netns

from .bpf import remove_pins
from .cgroup import CgroupTree
from .isolation import setns
from .patience import patience
from .privileges import Capability, become
from .process import Channel, Child, fork

NOBODY = 65534


def command(*words: str, text: str = "") -> str:
    """Run a program on the node; its standard output, RuntimeError with what it complained of."""
    done = subprocess.run(words, input=text, text=True, check=False, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr.strip()}\n{text}")
    return done.stdout


def ip(*commands: str) -> None:
    """Run `ip -batch`, one command a string."""
    command("ip", "-batch", "-", text="".join(f"{line}\n" for line in commands))


@dataclass(slots=True)
class Network:
    """A layer-2 network: a bridge of the node, with or without an address of the node on it."""

    bridge: str
    ipv4: str = "10.77.0"
    ipv6: str = "fd77::"
    node_is_router: bool = True
    taken: int = 1

    def create(self) -> None:
        ip(
            f"link add {self.bridge} type bridge forward_delay 0 mcast_snooping 0",
            f"link set {self.bridge} up",
        )
        if self.node_is_router:
            ip(
                f"addr add {self.ipv4}.1/24 dev {self.bridge}",
                f"addr add {self.ipv6}1/64 dev {self.bridge} nodad",
            )

    def next_addresses(self) -> tuple[str, str]:
        """The next free IPv4 and IPv6 address."""
        self.taken += 1
        return f"{self.ipv4}.{self.taken}", f"{self.ipv6}{self.taken:x}"


class BedPod:
    """A network namespace with addresses, and a way to run functions in it as an app would."""

    def __init__(
        self, bed: Bed, name: str, netns: Netns, ipv4: str | None, ipv6: str | None
    ) -> None:
        self.bed = bed
        self.name = name
        self.netns = netns
        self.ipv4 = ipv4
        self.ipv6 = ipv6
        self.veths: dict[str, str] = {}

    @property
    def path(self) -> str:
        """What `ip netns` mounted; also what the CLI takes."""
        return f"/run/netns/{self.name}"

    def address(self, family: str) -> str:
        """The pod's own address of family "v4" or "v6"."""
        chosen = self.ipv4 if family == "v4" else self.ipv6
        assert chosen is not None, f"{self!r} has no {family} address"
        return chosen

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        uid: int = NOBODY,
        gid: int = NOBODY,
        capabilities: Collection[Capability] = (),
        cgroup: Path | None = None,
        timeout: float = 20,
        **named: Any,
    ) -> Any:
        """Call `function(*args, **named)` in the pod as an unprivileged user; its result.

        The process is made in the bed's `apps` cgroup, or `cgroup`. What the function raises is
        raised here, with the child's traceback as a note.
        """
        settle = self._settler(uid, gid, capabilities, cgroup)
        call = functools.partial(function, *args, **named)
        name = f"{self.name}:{_name(function)}"
        with fork(name, settle, lambda _: call(), keep=self.bed.kept_descriptors()) as child:
            return child.wait(timeout)

    def spawn(
        self,
        function: Callable[..., Any],
        *args: Any,
        uid: int = NOBODY,
        gid: int = NOBODY,
        capabilities: Collection[Capability] = (),
        cgroup: Path | None = None,
        **named: Any,
    ) -> Child:
        """Start `function(channel, *args, **named)` as `run` does; it ends with the bed."""
        settle = self._settler(uid, gid, capabilities, cgroup)
        name = f"{self.name}:{_name(function)}"

        def body(channel: Channel) -> Any:
            return function(channel, *args, **named)

        child = fork(name, settle, body, keep=self.bed.kept_descriptors())
        self.bed.children.append(child)
        return child

    def _settler(
        self, uid: int, gid: int, capabilities: Iterable[Capability], cgroup: Path | None
    ) -> Callable[[], None]:
        """What moves a child to its place: the cgroup before all else, the user last."""

        def settle() -> None:
            (cgroup or self.bed.cgroup.apps).joinpath("cgroup.procs").write_text("0")
            setns(self.netns.fd, CLONE_NEWNET)
            become(uid, gid, capabilities)

        return settle

    def command(self, *words: str, text: str = "") -> str:
        """Run a program in the pod as root with `text` as its input; its standard output.

        It runs in the bed's cgroup as apps do: a process of a pod's network namespace that is
        outside of it makes an enrolment fail.
        """
        return str(self.run(command, *words, text=text, uid=0, gid=0))

    def ip(self, *commands: str) -> None:
        """Run `ip -batch` in the pod, one command a string."""
        self.run(ip, *commands, uid=0, gid=0)

    def __repr__(self) -> str:
        return f"<BedPod {self.name} {self.ipv4} {self.ipv6}>"


@dataclass(frozen=True, slots=True)
class Twin:
    """One of two networks with equal addresses: a pod, and a peer that only it can reach."""

    pod: BedPod
    peer: BedPod


def _remove_rules_of_node() -> None:
    """What a killed agent has left for probes: the next test's node must not begin with it."""
    if shutil.which("nft"):
        subprocess.run(["nft", "flush", "ruleset"], check=False, capture_output=True)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


@dataclass
class Bed:
    """The node of one test: its network, pods and processes."""

    cgroup: CgroupTree
    network: Network = field(default_factory=lambda: Network("br77"))
    children: list[Child] = field(default_factory=list)
    pods: dict[str, BedPod] = field(default_factory=dict)
    networks: list[Network] = field(default_factory=list)
    _veth_count: int = 0

    def __enter__(self) -> Self:
        # A left-over of a bed that broke down must not fail the tests after it: /run/netns is
        # this session's own.
        command("ip", "-all", "netns", "del")
        self.add_network(self.network)
        self.node = BedPod(
            self, "node", Netns.own(), f"{self.network.ipv4}.1", f"{self.network.ipv6}1"
        )
        return self

    def __exit__(self, *_: object) -> None:
        # Each step is tried whatever became of the others; the last pushed runs first.
        with contextlib.ExitStack() as steps:
            steps.callback(self.node.netns.close)
            for network in self.networks:
                steps.callback(ip, f"link del {network.bridge}")
            for pod in self.pods.values():
                steps.callback(self._remove_pod, pod)
            steps.callback(_remove_rules_of_node)
            steps.callback(remove_pins)
            steps.callback(self.cgroup.kill)
            for child in self.children:
                steps.callback(child.kill)

    def add_network(self, network: Network) -> Network:
        """Create another layer-2 network; removed with the bed."""
        network.create()
        self.networks.append(network)
        return network

    def pod(
        self, name: str, *, ipv4: bool = True, ipv6: bool = True, network: Network | None = None
    ) -> BedPod:
        """A pod with eth0 on `network` (default: the bed's own) and default routes by the node."""
        command("ip", "netns", "add", name)
        pod = BedPod(self, name, Netns.open(name), None, None)
        self.pods[name] = pod
        self._configure(pod, ipv6=ipv6)
        chosen = network or self.network
        pod.ipv4, pod.ipv6 = self.add_device(pod, "eth0", chosen, ipv4=ipv4, ipv6=ipv6)
        if chosen.node_is_router:
            self._add_default_routes(pod, chosen)
        return pod

    def add_device(
        self, pod: BedPod, device: str, network: Network, *, ipv4: bool = True, ipv6: bool = True
    ) -> tuple[str | None, str | None]:
        """Give a pod a device on `network`; its addresses there."""
        self._veth_count += 1
        veth = pod.veths[device] = f"veth{self._veth_count}"
        address4, address6 = network.next_addresses()
        ip(
            f"link add {veth} type veth peer name {device} netns {pod.name}",
            f"link set {veth} master {network.bridge} up",
        )
        inside = [f"link set {device} up"]
        if ipv4:
            inside.append(f"addr add {address4}/24 dev {device}")
        if ipv6:
            inside.append(f"addr add {address6}/64 dev {device} nodad")
        pod.ip(*inside)
        if ipv6:
            _await_local_route(pod.netns, address6)
        return (address4 if ipv4 else None), (address6 if ipv6 else None)

    def twin_networks(self) -> tuple[Twin, Twin]:
        """Two pods with the same addresses and names of their own, each with a peer of its own."""
        return self._twin("one"), self._twin("two")

    def _twin(self, which: str) -> Twin:
        network = Network(f"br-{which}", "10.88.0", "fd88::", node_is_router=False)
        self.add_network(network)
        pod = self.pod(f"{which}-pod", network=network)
        return Twin(pod, self.pod(f"{which}-peer", network=network))

    def remove_pod(self, pod: BedPod) -> None:
        """Delete the pod as a container runtime does: devices, then the name."""
        del self.pods[pod.name]
        self._remove_pod(pod)

    def kept_descriptors(self) -> list[int]:
        """The network namespaces: children may enter any of them."""
        return [pod.netns.fd for pod in (self.node, *self.pods.values())]

    def _configure(self, pod: BedPod, *, ipv6: bool) -> None:
        settings = ["net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.default.accept_ra=0"]
        if not ipv6:
            settings.append("net.ipv6.conf.all.disable_ipv6=1")
            settings.append("net.ipv6.conf.default.disable_ipv6=1")
        pod.command("sysctl", "-q", "-w", *settings)
        pod.ip("link set lo up")

    def _add_default_routes(self, pod: BedPod, network: Network) -> None:
        routes = []
        if pod.ipv4:
            routes.append(f"route add default via {network.ipv4}.1")
        if pod.ipv6:
            routes.append(f"route add ::/0 via {network.ipv6}1")
        pod.ip(*routes)

    def _remove_pod(self, pod: BedPod) -> None:
        pod.netns.close()
        for veth in pod.veths.values():
            subprocess.run(["ip", "link", "del", veth], check=False, capture_output=True)
        command("ip", "netns", "del", pod.name)

    def __repr__(self) -> str:
        return f"<Bed {', '.join(self.pods)} in {self.cgroup.path}>"


def _await_local_route(netns: Netns, address: str) -> None:
    """Wait until the kernel delivers to an IPv6 address: once it has noticed the carrier."""
    wanted = f"{socket.inet_pton(socket.AF_INET6, address).hex()} 80"
    deadline = time.monotonic() + patience(20)
    with netns.entered():
        while wanted not in Path("/proc/thread-self/net/ipv6_route").read_text():
            assert time.monotonic() < deadline, f"no local route to {address}"
            time.sleep(0.005)
