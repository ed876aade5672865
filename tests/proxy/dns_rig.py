"""The forwarder of pods in the test's own process, with clients and a resolver of the test's.

The pods are served as a foreign agent's are, without details, and captured by the rules that
istio-cni makes: queries get to port 15053 as the kernel brings them there.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from pyambient.dns.framing import Frames, framed
from pyambient.netns import Netns
from pyambient.proxy.dns.forwarder import Forwarder
from tests.bed import Bed, BedPod
from tests.dns import build

from .rig import ProxyRig, proxied

FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}
_UDP_RULE = "OUTPUT ! -o lo -p udp -m mark ! --mark 0x539/0xfff --dport 53 -j REDIRECT --to 15053"
_TCP_RULE = "OUTPUT ! -d {} -p tcp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to 15053"
# Without: a client on a port that the proxy has just used for the same resolver is not captured,
# because conntrack takes its query for one of the proxy's.
_ZONE_RULES = (
    "OUTPUT -p udp -m mark --mark 0x539/0xfff -m udp --dport 53 -j CT --zone 1",
    "PREROUTING -p udp -m mark ! --mark 0x539/0xfff -m udp --sport 53 -j CT --zone 1",
)
# Where the redirect has a query arrive.
ARRIVAL = {"v4": "127.0.0.1", "v6": "::1"}


def capture_dns(pod: BedPod) -> None:
    """What istio-cni adds for DNS."""
    for tool, loopback in (("iptables", "127.0.0.1/32"), ("ip6tables", "::1/128")):
        for rule in (_UDP_RULE, _TCP_RULE.format(loopback)):
            pod.command(tool, "-w", "-t", "nat", "-A", *rule.split())
        for rule in _ZONE_RULES:
            pod.command(tool, "-w", "-t", "raw", "-A", *rule.split())


class DnsRig:
    """Captured pods `app` and `other`, and a pod `resolver` that nobody captures."""

    def __init__(self, rig: ProxyRig, bed: Bed, closing: contextlib.ExitStack) -> None:
        self.rig = rig
        self.worker = rig.worker
        self.app, self.other, self.resolver = (bed.pods[n] for n in ("app", "other", "resolver"))
        self._closing = closing

    async def serve(self) -> None:
        for pod in (self.app, self.other):
            capture_dns(pod)
            await self.rig.pods.add(self.rig.ref(pod), Netns.open(pod.name))

    def end(self) -> None:
        """End both pods, with whatever is in flight."""
        for pod in (self.app, self.other):
            self.rig.pods._end(pod.name, "end of the test")

    def forwarder(self, pod: BedPod | None = None) -> Forwarder:
        forwarder = self.rig.pods._pods[(pod or self.app).name].forwarder
        assert forwarder is not None
        return forwarder

    @property
    def counters(self):
        return self.forwarder().counters

    def shorten_timeout(self, seconds: float = 0.2) -> None:
        """Have queries time out sooner, for a test of what comes then."""
        self.worker.queries.seconds = seconds

    def open(self, pod: BedPod, family: str, kind: int = socket.SOCK_DGRAM):
        """A trio socket in a pod, closed with the rig."""
        made = trio.socket.from_stdlib_socket(pod.netns.socket(FAMILIES[family], kind))
        self._closing.callback(made.close)
        return made

    async def client(self, family: str, pod: BedPod | None = None, kind: int = socket.SOCK_DGRAM):
        """A socket of an app, connected to the resolver."""
        made = self.open(pod or self.app, family, kind)
        await made.connect((self.resolver.address(family), 53))
        return made

    async def udp_server(self, family: str):
        """The resolver's UDP socket."""
        made = self.open(self.resolver, family)
        await made.bind((self.resolver.address(family), 53))
        return made

    async def tcp_server(self, family: str):
        made = self.open(self.resolver, family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await made.bind((self.resolver.address(family), 53))
        made.listen(256)
        return made

    async def accept(self, listener):
        """The next connection that the resolver gets."""
        connection, peer = await listener.accept()
        self._closing.callback(connection.close)
        return Messages(connection, peer)

    async def tcp_client(self, family: str, pod: BedPod | None = None):
        return Messages(await self.client(family, pod, socket.SOCK_STREAM))


class Messages:
    """A TCP connection of a test that speaks in DNS messages."""

    def __init__(self, connection, peer=None) -> None:
        self.connection = connection
        self.peer = peer
        self._frames = Frames()

    async def send(self, *messages: bytes) -> None:
        """Send all messages in one piece."""
        data = b"".join(map(framed, messages))
        while data:
            data = data[await self.connection.send(data) :]

    async def receive(self) -> bytes | None:
        """The next message, None at the end of the stream."""
        while (message := self._frames.next()) is None:
            data = await self.connection.recv(1 << 16)
            if not data:
                return None
            self._frames.feed(data)
        return message

    def close(self) -> None:
        self.connection.close()


def forwarding(bed: Bed, directory: Path, test: Callable[[DnsRig], Awaitable[None]]) -> None:
    """Run `test(rig)` with both pods served."""
    for name in ("app", "other", "resolver"):
        bed.pod(name)

    async def run(rig: ProxyRig) -> None:
        with contextlib.ExitStack() as closing:
            dns = DnsRig(rig, bed, closing)
            await dns.serve()
            try:
                await test(dns)
            finally:
                dns.end()

    proxied(bed, directory, run)


async def answer_all(server, **named) -> None:
    """A resolver that answers everything, until cancelled."""
    while True:
        asked, peer = await server.recvfrom(1 << 16)
        await server.sendto(build.answer_to(asked, **named), peer)


def is_readable(sock) -> bool:
    """Whether something has arrived at a trio socket."""
    return bool(select.select([sock.fileno()], [], [], 0)[0])


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; the rig's own deadline bounds it."""
    while not condition():  # noqa: ASYNC110 - the condition has no event of its own
        await trio.sleep(0.005)
