"""What an app tries while something of the mesh is down: TCP and DNS, in both families."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from pyambient.dns.framing import framed
from pyambient.model.address import SocketAddress
from tests.bed import BedPod, ClientOptions, capturing
from tests.dns import build

_TCP, _UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
_DNS = 53
_TRIED = ((_TCP, 8080), (_TCP, _DNS), (_UDP, _DNS))
_PROTOCOLS = {_TCP: socket.IPPROTO_TCP, _UDP: socket.IPPROTO_UDP}
# The forwarder answers a query with two questions itself, and asks nobody (RFC 9619).
_QUERY = struct.pack("!6H", 7, 0, 2, 0, 0, 0) + 2 * build.question()
EVERYTHING = frozenset(
    f"{kind.name} {family} {port}" for kind, port in _TRIED for family in ("v4", "v6")
)


@dataclass(frozen=True, slots=True)
class Tried:
    """What failed of all attempts, and how; and what of them was to be seen on the wire."""

    failed: Mapping[str, str]
    leaked: frozenset[str]


def try_all(pod: BedPod, outside: BedPod, patience: float) -> Tried:
    """Have an app of `pod` talk to one outside, and wait `patience` s for each answer."""
    targets = {
        f"{kind.name} {family} {port}": (kind, SocketAddress(outside.address(family), port))
        for kind, port in _TRIED
        for family in ("v4", "v6")
    }
    with capturing(pod) as capture:
        failed = pod.run(_try_each, targets, patience)
    seen = {(packet.protocol, packet.destination) for packet in capture.packets}
    leaked = {name for name, (kind, there) in targets.items() if (_PROTOCOLS[kind], there) in seen}
    return Tried(failed, frozenset(leaked))


def _try_each(
    targets: Mapping[str, tuple[socket.SocketKind, SocketAddress]], patience: float
) -> dict[str, str]:
    failed = {}
    for name, (kind, there) in targets.items():
        try:
            _try(kind, there, patience)
        except OSError as error:
            failed[name] = errno.errorcode.get(error.errno or errno.ETIMEDOUT, "?")
    return failed


def _try(kind: socket.SocketKind, there: SocketAddress, patience: float) -> None:
    """Be taken by somebody, and be answered if it is a query."""
    with ClientOptions(timeout=patience).socket(there, kind) as client:
        client.connect(there.sockaddr())
        if there.port == _DNS:
            client.sendall(framed(_QUERY) if kind is _TCP else _QUERY)
            if not client.recv(512):
                raise ConnectionResetError(errno.ECONNRESET, "no answer")
