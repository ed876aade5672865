"""A proxy without a mesh: for tests of interception that must not depend on the engine.

It does to sockets what the real proxy does, and nothing to bytes: listeners on all ports in each
pod, found original destination, upstream socket made in the pod. What comes to 15001 and 15053 goes
on to where the app meant (UDP as well: `nulldns`); what comes to 15006 goes on to the app with the
client's own address as its source; 15008 is accepted, noted and closed, for there is no HBONE here.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import trio

from pyambient.model.address import SocketAddress, from_sockaddr
from pyambient.model.numbers import (
    DNS_PORT,
    HBONE_PORT,
    INBOUND_PORT,
    OUTBOUND_PORT,
    PROXY_MARK,
    RESOLVER_PORT,
)
from pyambient.model.ports import WELL_KNOWN
from pyambient.proxy.sockets import ONLY, Place

from . import nulldns
from .network import Bed, BedPod
from .process import Channel

# Netfilter's getsockopt for both families (linux/netfilter_ipv4.h), and the transparent options;
# the socket module names none of them.
_SO_ORIGINAL_DST = 80
_IP_TRANSPARENT = 19
_IPV6_TRANSPARENT = 75
_CHUNK = 1 << 16
# Outside ip_local_port_range, so that no upstream tuple meets one of the client's own.
_SOURCE_PORTS = range(10000, 30000)


@dataclass(frozen=True, slots=True)
class Interception:
    """One connection that reached a listener of the proxy; `port` is the listener's.

    `failure` is the errno of the connection onwards, 0 if there was none.
    """

    pod: str
    port: int
    peer: SocketAddress
    original: SocketAddress
    failure: int = 0


class NullProxy:
    """The running proxy, seen from the test.

    `pods` maps each pod to its backend: original destinations are known by SO_ORIGINAL_DST with
    those of netfilter, by getsockname with the others. `place` is that of one worker of several.
    """

    def __init__(self, bed: Bed, pods: Mapping[BedPod, str], place: Place = ONLY) -> None:
        bed.cgroup.proxy.mkdir(exist_ok=True)
        self.child = bed.node.spawn(
            _serve, dict(pods), place, uid=0, gid=0, cgroup=bed.cgroup.proxy
        )
        assert self.child.receive() == "listening"

    @classmethod
    def of(cls, bed: Bed, pods: Iterable[BedPod], backend: str, place: Place = ONLY) -> Self:
        """A proxy for `pods`, all with one backend."""
        return cls(bed, dict.fromkeys(pods, backend), place)

    def accepted(self) -> list[Interception]:
        """All that reached a listener so far, in order of the outcome."""
        return list(self.child.ask("accepted"))

    def stop_listening(self) -> None:
        """Close the listeners and keep what is relayed."""
        assert self.child.ask("stop listening") == "stopped"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()

    def __repr__(self) -> str:
        return f"<NullProxy pid {self.child.pid}>"


def _serve(channel: Channel, pods: Mapping[BedPod, str], place: Place) -> None:
    trio.run(_Proxy(channel, pods, place).run)


class _Proxy:
    def __init__(self, channel: Channel, pods: Mapping[BedPod, str], place: Place) -> None:
        self.channel = channel
        self.pods = pods
        self.place = place
        self.source_ports = itertools.cycle(_SOURCE_PORTS[place.number :: place.total])
        self.seen: list[Interception] = []
        self.accepting = trio.CancelScope()

    async def run(self) -> None:
        listeners = [
            (pod, _listener(pod, port, self.place))
            for pod in self.pods
            for port in (OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT, DNS_PORT)
        ]
        forwarders = [nulldns.Forwarder(pod, backend) for pod, backend in self.pods.items()]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._accept_all, nursery, listeners, forwarders)
            self.channel.send("listening")
            await self._obey()
            nursery.cancel_scope.cancel()

    async def _obey(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.channel.fileno())
            try:
                command = self.channel.receive()
            except EOFError:
                return
            if command == "accepted":
                self.channel.send(list(self.seen))
            else:
                self.accepting.cancel()

    async def _accept_all(
        self,
        relays: trio.Nursery,
        listeners: list[tuple[BedPod, trio.socket.SocketType]],
        forwarders: list[nulldns.Forwarder],
    ) -> None:
        with self.accepting:
            async with trio.open_nursery() as nursery:
                for pod, listening in listeners:
                    nursery.start_soon(self._accept, relays, pod, listening)
                for forwarder in forwarders:
                    nursery.start_soon(self._forward, relays, forwarder)
        for _, listening in listeners:
            listening.close()
        self.channel.send("stopped")

    async def _forward(self, answers: trio.Nursery, forwarder: nulldns.Forwarder) -> None:
        with forwarder:
            while True:
                query = await forwarder.receive()
                original = SocketAddress(query.resolver or "", RESOLVER_PORT)
                failure = 0 if query.resolver else errno.EHOSTUNREACH
                seen = Interception(forwarder.pod.name, DNS_PORT, query.peer, original, failure)
                self.seen.append(seen)
                answers.start_soon(forwarder.answer, query)

    async def _accept(
        self, relays: trio.Nursery, pod: BedPod, listening: trio.socket.SocketType
    ) -> None:
        port = listening.getsockname()[1]
        while True:
            downstream, peer = await listening.accept()
            relays.start_soon(self._handle, pod, port, downstream, from_sockaddr(peer))

    async def _handle(
        self, pod: BedPod, port: int, downstream: trio.socket.SocketType, peer: SocketAddress
    ) -> None:
        """Note the connection, and pass it on or reset it."""
        original = _original_destination(downstream, netfilter=self.pods[pod] not in ("bpf", "tc"))
        failure = errno.ELOOP
        with downstream:
            if original.port not in WELL_KNOWN.loops:
                source = None
                if port == INBOUND_PORT:
                    source = SocketAddress(peer.ip, next(self.source_ports))
                upstream = _upstream(pod, original, source)
                failure = await _connect(upstream, original)
            self.seen.append(Interception(pod.name, port, peer, original, failure))
            if failure:
                _reset_on_close(downstream)
                return
            with upstream:
                await _relay(downstream, upstream)


def _listener(pod: BedPod, port: int, place: Place) -> trio.socket.SocketType:
    made = pod.netns.socket(socket.AF_INET6, socket.SOCK_STREAM)
    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    _make_transparent(made)
    made.bind(("::", port))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, place.priority)
    made.listen(4096)
    return trio.socket.from_stdlib_socket(made)


def _make_transparent(made: socket.socket) -> None:
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK)
    made.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
    if made.family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)


def _original_destination(accepted: trio.socket.SocketType, *, netfilter: bool) -> SocketAddress:
    local = from_sockaddr(accepted.getsockname())
    if not netfilter:
        return local
    if local.is_ipv6:
        raw = accepted.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28)
        return from_sockaddr((socket.inet_ntop(socket.AF_INET6, raw[8:24]), *_port(raw)))
    raw = accepted.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16)
    return from_sockaddr((socket.inet_ntop(socket.AF_INET, raw[4:8]), *_port(raw)))


def _port(raw: bytes) -> tuple[int]:
    """The port of a sockaddr_in or sockaddr_in6: two bytes behind the family."""
    (port,) = struct.unpack_from("!H", raw, 2)
    return (port,)


def _upstream(
    pod: BedPod, destination: SocketAddress, source: SocketAddress | None
) -> trio.socket.SocketType:
    """A marked socket in the pod, bound to `source` where there is one."""
    made = pod.netns.socket(destination.family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK)
    if source is not None:
        _make_transparent(made)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(source.sockaddr())
    return trio.socket.from_stdlib_socket(made)


async def _connect(upstream: trio.socket.SocketType, destination: SocketAddress) -> int:
    """0, or the errno; the socket is closed then."""
    try:
        with trio.fail_after(10):
            await upstream.connect(destination.sockaddr())
    except trio.TooSlowError:
        failure = errno.ETIMEDOUT
    except OSError as error:
        failure = error.errno or errno.EIO
    else:
        return 0
    upstream.close()
    return failure


async def _relay(one: trio.socket.SocketType, other: trio.socket.SocketType) -> None:
    """Both directions to their ends: an end of stream stays one, a reset stays one."""
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_copy, one, other)
            nursery.start_soon(_copy, other, one)
    except* OSError:
        _reset_on_close(one)
        _reset_on_close(other)


async def _copy(source: trio.socket.SocketType, sink: trio.socket.SocketType) -> None:
    while data := await source.recv(_CHUNK):
        view = memoryview(data)
        while view:
            view = view[await sink.send(view) :]
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _reset_on_close(closing: trio.socket.SocketType) -> None:
    closing.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
