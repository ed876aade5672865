"""Apps that ask a resolver over UDP in the ways that apps do, and resolvers for them."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass

from pyambient.model.address import SocketAddress, from_sockaddr
from pyambient.model.numbers import DNS_PORT, RESOLVER_PORT
from tests.bed import BedPod, Channel, Child, ClientOptions, Packet, apps

from .bpf_mesh import BpfMesh

_LONGEST = 1 << 16


@dataclass(frozen=True, slots=True)
class Answer:
    """What an app got, and what its socket says: the sender, the peer (connected), its own name."""

    data: bytes
    sender: SocketAddress
    peer: SocketAddress | None
    local: SocketAddress


def resolve(pod: BedPod, port: int = RESOLVER_PORT, host: str = "::") -> Child:
    """A resolver in the pod: it says back what it is asked, over UDP."""
    resolver = pod.spawn(apps.udp_echo, port, host, uid=0, gid=0)
    assert resolver.receive() == "listening"
    return resolver


def resolve_tcp(pod: BedPod) -> Child:
    """The same over TCP."""
    resolver = pod.spawn(apps.echo_server, RESOLVER_PORT, uid=0, gid=0)
    assert resolver.receive() == "listening"
    return resolver


def resolver_at(pod: BedPod, family: str) -> SocketAddress:
    return SocketAddress(pod.address(family), RESOLVER_PORT)


def ask(
    resolver: SocketAddress,
    data: bytes,
    options: ClientOptions | None = None,
    *,
    connected: bool = False,
) -> Answer | int:
    """Send one query and wait for its answer; the errno of what failed."""
    chosen = options or ClientOptions(timeout=5)
    with chosen.socket(resolver, socket.SOCK_DGRAM) as client:
        try:
            return _ask(client, chosen, resolver, data, connected=connected)
        except TimeoutError:
            return -1
        except OSError as error:
            return error.errno or 0


def _ask(
    client: socket.socket,
    options: ClientOptions,
    resolver: SocketAddress,
    data: bytes,
    *,
    connected: bool,
) -> Answer:
    if connected:
        client.connect(options.sockaddr(resolver))
        client.send(data)
    else:
        client.sendto(data, options.sockaddr(resolver))
    answer, sender = client.recvfrom(_LONGEST)
    peer = None
    if connected:
        with contextlib.suppress(OSError):
            peer = from_sockaddr(client.getpeername())
    return Answer(answer, from_sockaddr(sender), peer, from_sockaddr(client.getsockname()))


def ask_each(resolvers: list[SocketAddress], data: bytes) -> dict[SocketAddress, bytes]:
    """Ask several at once from one socket, as musl does; what came from whom."""
    answers: dict[SocketAddress, bytes] = {}
    with socket.socket(resolvers[0].family, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        for number, resolver in enumerate(resolvers):
            client.sendto(data + b"%d" % number, resolver.sockaddr())
        while len(answers) < len(resolvers):
            answer, sender = client.recvfrom(_LONGEST)
            answers[from_sockaddr(sender)] = answer
    return answers


def keep_asking(channel: Channel, resolver: SocketAddress, *, connected: bool = False) -> None:
    """Ask on one and the same socket whenever told; the sender of the answer, or the errno."""
    with socket.socket(resolver.family, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        if connected:
            client.connect(resolver.sockaddr())
        channel.send("ready")
        while channel.receive() == "ask":
            try:
                data = os.urandom(8)
                if connected:
                    client.send(data)
                else:
                    client.sendto(data, resolver.sockaddr())
                answer, sender = client.recvfrom(_LONGEST)
                channel.send(from_sockaddr(sender) if answer == data else answer)
            except TimeoutError:
                channel.send(-1)
            except OSError as error:
                channel.send(error.errno)


def originals(mesh: BpfMesh) -> list[tuple[str, int, SocketAddress]]:
    """What reached the proxy: in which pod, on which port, and for whom it was meant."""
    return [(seen.pod, seen.port, seen.original) for seen in mesh.intercepted()]


def queries(packets: list[Packet]) -> list[Packet]:
    """What of the packets is a query, to whichever of the ports."""
    return [p for p in packets if p.ports[1] in (RESOLVER_PORT, DNS_PORT)]
