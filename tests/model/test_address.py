"""Addresses: one spelling each, and authorities that peers send."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyambient.model.address import (
    HostPort,
    SocketAddress,
    canonical_ip,
    from_sockaddr,
    packed_ip,
    parse_authority,
)

CANONICAL = [
    ("10.0.0.1", "10.0.0.1"),
    ("fd00:0:0::1", "fd00::1"),
    ("FD00::A", "fd00::a"),
    ("::1", "::1"),
    ("::ffff:10.0.0.1", "10.0.0.1"),
    ("::ffff:a00:1", "10.0.0.1"),
    ("fe80::1%2", "fe80::1%2"),
    ("fe80:0::1%02", "fe80::1%2"),
]
NO_IP = [
    "",
    "10.0.0",
    "10.0.0.256",
    "010.0.0.1",
    "10.0.0.1%2",
    "fe80::1%",
    "fe80::1%eth0",
    "fe80::1%99999999999",
    "[::1]",
    "::1\0",
    "\uff110.0.0.1",
    "localhost",
]


@pytest.mark.parametrize(("text", "expected"), CANONICAL)
def test_canonical(text, expected):
    """All spellings of an address become the one that inet_ntop prints."""
    assert canonical_ip(text) == expected


@pytest.mark.parametrize("text", NO_IP)
def test_not_an_ip(text):
    """What is no address, or has a scope that means nothing elsewhere, is a ValueError."""
    with pytest.raises(ValueError):
        canonical_ip(text)


@given(st.ip_addresses())
def test_canonical_is_stable(address):
    """The canonical form is its own canonical form, and the same address."""
    text = canonical_ip(str(address))
    assert canonical_ip(text) == text
    expected = getattr(address, "ipv4_mapped", None) or address
    assert ipaddress.ip_address(text) == expected


@pytest.mark.parametrize(
    ("authority", "expected"),
    [
        ("10.0.0.2:8080", SocketAddress("10.0.0.2", 8080)),
        ("[fd00::2]:8080", SocketAddress("fd00::2", 8080)),
        ("[FD00:0::2]:1", SocketAddress("fd00::2", 1)),
        ("[::ffff:10.0.0.2]:80", SocketAddress("10.0.0.2", 80)),
        ("[fe80::1%3]:80", SocketAddress("fe80::1%3", 80)),
        ("10.0.0.2:65535", SocketAddress("10.0.0.2", 65535)),
        ("server.default.svc.cluster.local:80", HostPort("server.default.svc.cluster.local", 80)),
        ("name.:80", HostPort("name.", 80)),
        ("*.example.com:443", HostPort("*.example.com", 443)),
        ("10.0.0.2.example:80", HostPort("10.0.0.2.example", 80)),
    ],
)
def test_authority(authority, expected):
    """Authorities are an IPv4 address, a bracketed IPv6 address or a name, and a port."""
    assert parse_authority(authority) == expected


@pytest.mark.parametrize(
    "authority",
    [
        "",
        ":80",
        "10.0.0.2",
        "10.0.0.2:",
        "10.0.0.2:0",
        "10.0.0.2:65536",
        "10.0.0.2:+80",
        "10.0.0.2:8 0",
        "10.0.0.2:000080",
        "10.0.0.2:\uff18\uff10",
        "10.0.0.256:80",
        "10.0.2:80",
        "1:80",
        "fd00::2:80",
        "[fd00::2]",
        "[fd00::2:80",
        "fd00::2]:80",
        "[10.0.0.2]:80",
        "[name]:80",
        "[]:80",
        " name:80",
        "na me:80",
        "name\n:80",
        "user@name:80",
        "http://name:80",
        "name/path:80",
        'na"me:80',
        "näme:80",
        "n" * 300 + ":80",
    ],
)
def test_bad_authority(authority):
    """Anything else is a ValueError, so that nothing odd reaches a look-up or a log."""
    with pytest.raises(ValueError):
        parse_authority(authority)


@given(st.text(max_size=40))
def test_authority_never_surprises(authority):
    """Whatever a peer sends is parsed or is a ValueError, and what is parsed prints as itself."""
    try:
        parsed = parse_authority(authority)
    except ValueError:
        return
    assert parse_authority(str(parsed)) == parsed


def test_text_form():
    """IPv6 stands in brackets where a port follows."""
    assert str(SocketAddress("10.0.0.1", 80)) == "10.0.0.1:80"
    assert str(SocketAddress("fd00::1", 80)) == "[fd00::1]:80"
    assert str(HostPort("name", 80)) == "name:80"


@pytest.mark.parametrize(
    ("sockaddr", "expected"),
    [
        (("10.0.0.1", 80), SocketAddress("10.0.0.1", 80)),
        (("::ffff:10.0.0.1", 80, 0, 0), SocketAddress("10.0.0.1", 80)),
        (("fd00::1", 80, 0, 0), SocketAddress("fd00::1", 80)),
        (("fe80::1", 80, 0, 2), SocketAddress("fe80::1%2", 80)),
        (("fe80::1%2", 80, 0, 2), SocketAddress("fe80::1%2", 80)),
    ],
)
def test_from_sockaddr(sockaddr, expected):
    """What a socket reports becomes canonical, with its scope."""
    assert from_sockaddr(sockaddr) == expected


@pytest.mark.parametrize("address", ["10.0.0.1", "fd00::1", "fe80::1%2"])
def test_sockaddr_round_trip(address):
    """The tuple for connect and bind is the one that getsockname gives back."""
    there = SocketAddress(address, 80)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    assert there.family is family
    assert from_sockaddr(there.sockaddr()) == there


def test_sockaddr():
    """IPv4 has two parts, IPv6 four with the scope at the end."""
    assert SocketAddress("10.0.0.1", 80).sockaddr() == ("10.0.0.1", 80)
    assert SocketAddress("fe80::1%2", 80).sockaddr() == ("fe80::1", 80, 0, 2)
    assert SocketAddress("fd00::1", 80).sockaddr() == ("fd00::1", 80, 0, 0)


def test_packed():
    """The form of the BPF maps: sixteen bytes, IPv4 mapped."""
    assert packed_ip("10.0.0.1") == bytes(10) + b"\xff\xff\x0a\x00\x00\x01"
    assert packed_ip("fe80::1%2") == b"\xfe\x80" + bytes(13) + b"\x01"
