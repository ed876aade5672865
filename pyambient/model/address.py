"""Addresses as values: an IP in canonical text, and a port.

The text form is what `inet_ntop` prints, so that two spellings of one address are one dictionary
key. IPv4-mapped IPv6 (`::ffff:10.0.0.1`, what a dual-stack listener sees) becomes plain IPv4
before any comparison, log line or policy check. A link-local address keeps its scope as
`fe80::1%2`.
"""

from __future__ import annotations

import re
import socket
from typing import Any, NamedTuple

_MAPPED = "::ffff:"
# What a name in an authority may consist of; anything else could forge a log line.
_HOST = re.compile(r"[A-Za-z0-9_*][A-Za-z0-9._-]{0,252}")


class SocketAddress(NamedTuple):
    """An IP address in canonical text, and a port."""

    ip: str
    port: int

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.ip

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.ip else socket.AF_INET

    def sockaddr(self) -> tuple[Any, ...]:
        """The tuple that `socket.connect` and `socket.bind` take for `family`."""
        if ":" not in self.ip:
            return (self.ip, self.port)
        ip, _, scope = self.ip.partition("%")
        return (ip, self.port, 0, int(scope) if scope else 0)

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


class HostPort(NamedTuple):
    """A host name and a port, as an authority through a network gateway carries them."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def from_sockaddr(sockaddr: tuple[Any, ...]) -> SocketAddress:
    """The address in a `getsockname`/`getpeername`/`accept` tuple of AF_INET or AF_INET6."""
    ip = sockaddr[0]
    if ip.startswith(_MAPPED) and "." in ip:
        ip = ip[len(_MAPPED) :]
    elif len(sockaddr) == 4 and sockaddr[3] and "%" not in ip:
        ip = f"{ip}%{sockaddr[3]}"
    return SocketAddress(ip, sockaddr[1])


def canonical_ip(text: str) -> str:
    """`text` as `inet_ntop` would print it, IPv4-mapped IPv6 as IPv4; ValueError if no IP.

    Just IPv6 has a scope, and it is a number: a name (`%eth0`) means something in one network
    namespace only.
    """
    address, percent, scope = text.partition("%")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        printed = socket.inet_ntop(family, socket.inet_pton(family, address))
    except OSError:
        raise ValueError(f"{text!r} is not an IP address") from None
    if percent:
        printed = f"{printed}%{_scope(text, scope)}"
    if printed.startswith(_MAPPED) and "." in printed:
        return printed[len(_MAPPED) :].partition("%")[0]
    return printed


def _scope(text: str, scope: str) -> int:
    if ":" in text and scope.isascii() and scope.isdigit() and len(scope) < 10:
        return int(scope)
    raise ValueError(f"{text!r} has a scope that is no interface number")


def packed_ip(ip: str) -> bytes:
    """Sixteen bytes, IPv4 as IPv4-mapped IPv6: the form of the BPF address maps."""
    ip = ip.partition("%")[0]
    if ":" in ip:
        return socket.inet_pton(socket.AF_INET6, ip)
    return b"\0" * 10 + b"\xff\xff" + socket.inet_pton(socket.AF_INET, ip)


def is_loopback(ip: str) -> bool:
    return ip.startswith("127.") or ip == "::1"


def parse_authority(authority: str) -> SocketAddress | HostPort:
    """Parse `10.0.0.2:8080`, `[fd00::2]:8080` or `name:80`; ValueError for all else.

    The port must be there, in plain decimal digits and from 1 to 65535 (RFC 9113 section 8.5
    sends CONNECT's host and port in :authority). A host whose last label is a number is an IPv4
    address or nothing, never a name.
    """
    host, colon, digits = authority.rpartition(":")
    if not colon or not (digits.isascii() and digits.isdigit()) or len(digits) > 5:
        raise ValueError(f"{authority!r} has no port")
    port = int(digits)
    if not 0 < port < 65536:
        raise ValueError(f"{authority!r} has a port out of range")
    if host.startswith("[") and host.endswith("]") and ":" in host:
        return SocketAddress(canonical_ip(host[1:-1]), port)
    if _HOST.fullmatch(host) is None:
        raise ValueError(f"{authority!r} is not host:port")
    if host.rstrip(".").rpartition(".")[2].isdigit():
        return SocketAddress(canonical_ip(host), port)
    return HostPort(host, port)
