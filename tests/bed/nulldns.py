"""The null proxy's part for DNS over UDP: whom the app asked is asked, from the app's pod."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import trio

from pyambient.intercept.netns_cookie import netns_cookie
from pyambient.intercept.original_dns import (
    ResolverLookup,
    addressed_resolvers,
    bpf_resolvers,
    conntrack_resolvers,
)
from pyambient.model.address import SocketAddress, from_sockaddr
from pyambient.model.numbers import DNS_PORT, LOOPBACK_MARK, PROXY_MARK, RESOLVER_PORT

from .network import BedPod

_BPFFS = Path("/sys/fs/bpf/pyambient")
_IPV6_TRANSPARENT = 75
_PACKET_INFO = struct.Struct("=16sI")
_LONGEST = 1 << 16
_PATIENCE = 5


@dataclass(frozen=True, slots=True)
class Query:
    """A datagram as it came; `local` is the raw address that the answer must come from."""

    data: bytes
    peer: SocketAddress
    sockaddr: tuple[str, int, int, int]
    local: bytes
    resolver: str | None


class Forwarder:
    """A socket on 15053 of a pod, for both families and all addresses."""

    def __init__(self, pod: BedPod, backend: str) -> None:
        self.pod = pod
        self._backend = backend
        self._lookup: ResolverLookup | None = None
        made = pod.netns.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        mark = LOOPBACK_MARK if backend == "tc" else PROXY_MARK
        made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(("::", DNS_PORT))
        self._socket = trio.socket.from_stdlib_socket(made)

    async def receive(self) -> Query:
        data, control, _, sockaddr = await self._socket.recvmsg(_LONGEST, 256)
        ((_, _, info),) = control
        local = info[:16]
        local_ip = from_sockaddr((socket.inet_ntop(socket.AF_INET6, local), DNS_PORT)).ip
        peer = from_sockaddr(sockaddr)
        return Query(data, peer, sockaddr, local, self._resolvers().resolver(peer, local_ip))

    async def answer(self, query: Query) -> None:
        """Ask the resolver, pass on what it says; nothing where there is none or it is silent."""
        if query.resolver is None:
            return
        resolver = SocketAddress(query.resolver, RESOLVER_PORT)
        made = self.pod.netns.socket(resolver.family, socket.SOCK_DGRAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK)
        with trio.socket.from_stdlib_socket(made) as upstream, trio.move_on_after(_PATIENCE):
            await upstream.sendto(query.data, resolver.sockaddr())
            answer = await upstream.recv(_LONGEST)
            source = (
                socket.IPPROTO_IPV6,
                socket.IPV6_PKTINFO,
                _PACKET_INFO.pack(query.local, 0),
            )
            await self._socket.sendmsg([answer], [source], 0, query.sockaddr)

    def _resolvers(self) -> ResolverLookup:
        """Made when it is needed: the maps are pinned later than the proxy starts."""
        if self._lookup is None:
            self._lookup = self._make_lookup()
        return self._lookup

    def _make_lookup(self) -> ResolverLookup:
        pod = self.pod
        match self._backend:
            case "bpf":
                return bpf_resolvers(_BPFFS, netns_cookie(pod.netns, pod.bed.cgroup.path))
            case "tc":
                return addressed_resolvers(pod.netns, lambda ip: ip in (pod.ipv4, pod.ipv6))
            case _:
                return conntrack_resolvers(pod.netns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        if self._lookup is not None:
            self._lookup.close()

    def __repr__(self) -> str:
        return f"<Forwarder of {self.pod.name}>"
