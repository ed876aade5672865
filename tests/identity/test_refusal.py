"""Whom the TLS contexts keep out, and with which alert."""

from __future__ import annotations

import ssl
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from pyambient.identity.certificate import Certificate
from pyambient.identity.context import client_context, require_alpn, server_context
from pyambient.identity.peer import PeerRefused

from .tls import (
    CLIENT,
    DAY,
    SERVER,
    Library,
    Mint,
    Standard,
    join,
    lax_context,
    pem,
    standard_context,
)

MINT = Mint()
STRANGER = Mint("elsewhere")
NAMESAKE = Mint()


def our_client(certificate: Certificate) -> Library:
    return Library(client_context(certificate), server=False)


def our_server(certificate: Certificate) -> Library:
    return Library(server_context(certificate), server=True)


def test_client_without_certificate() -> None:
    """The handshake fails with the alert certificate_required."""
    client = Standard(standard_context(MINT, None), server=False)
    server = our_server(MINT.issue(SERVER))
    join(client, server)
    assert server.error == "peer did not return a certificate"
    assert not server.established
    assert client.error == "tlsv13 alert certificate required"


@pytest.mark.parametrize(
    ("authority", "alert"),
    [(STRANGER, "tlsv1 alert unknown ca"), (NAMESAKE, "tlsv1 alert decrypt error")],
)
def test_client_of_another_ca(authority: Mint, alert: str) -> None:
    """A root of another name, or of our root's name and with another key, gets no client in."""
    client = Standard(standard_context(MINT, authority.issue(CLIENT)), server=False)
    server = our_server(MINT.issue(SERVER))
    join(client, server)
    assert server.error == "certificate verify failed"
    assert not server.established
    assert client.error == alert


def test_server_of_another_ca() -> None:
    """Our client ends the handshake and tells the server unknown_ca."""
    client = our_client(MINT.issue(CLIENT))
    server = Standard(standard_context(MINT, STRANGER.issue(SERVER), server=True), server=True)
    join(client, server)
    assert client.error == "certificate verify failed"
    assert not client.established
    assert server.error == "tlsv1 alert unknown ca"


@pytest.mark.parametrize("age", [2 * DAY, timedelta(hours=-1)])
def test_client_outside_its_time(age: timedelta) -> None:
    """A leaf that has expired, or is not valid yet, gets no client in."""
    client = our_client(MINT.issue(CLIENT, age=age))
    server = our_server(MINT.issue(SERVER))
    join(client, server)
    assert server.error == "certificate verify failed"
    assert not server.established


@pytest.mark.parametrize("age", [2 * DAY, timedelta(hours=-1)])
def test_server_outside_its_time(age: timedelta) -> None:
    """A leaf that has expired, or is not valid yet, is refused by our client."""
    client = our_client(MINT.issue(CLIENT))
    server = our_server(MINT.issue(SERVER, age=age))
    join(client, server)
    assert client.error == "certificate verify failed"
    assert not client.established


def test_client_with_a_servers_certificate() -> None:
    """The server demands the purpose clientAuth."""
    client = our_client(MINT.issue(CLIENT, purposes=[ExtendedKeyUsageOID.SERVER_AUTH]))
    server = our_server(MINT.issue(SERVER))
    join(client, server)
    assert server.error == "certificate verify failed"
    assert not server.established
    assert client.error == "tls alert unsupported certificate"


def test_server_with_a_clients_certificate() -> None:
    """The client demands the purpose serverAuth."""
    client = our_client(MINT.issue(CLIENT))
    server = our_server(MINT.issue(SERVER, purposes=[ExtendedKeyUsageOID.CLIENT_AUTH]))
    join(client, server)
    assert client.error == "certificate verify failed"
    assert not client.established


def test_a_workload_cannot_sign() -> None:
    """A leaf of the mesh, used as an authority for another identity, gets no one in."""
    key = ec.generate_private_key(ec.SECP256R1())
    workload = Mint(key=key)
    workload.subject = MINT.leaf(key, [str(CLIENT)]).subject
    forged = workload.issue(SERVER)
    chain = (*forged.chain, pem(MINT.leaf(key, [str(CLIENT)])))
    client = our_client(replace(forged, chain=chain, roots=(pem(MINT.certificate),)))
    server = our_server(MINT.issue(SERVER))
    join(client, server)
    assert server.error == "certificate verify failed"
    assert not server.established


def test_tls_1_2_client() -> None:
    """Older TLS gets the alert protocol_version."""
    context = standard_context(MINT, MINT.issue(CLIENT))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client, server = Standard(context, server=False), our_server(MINT.issue(SERVER))
    join(client, server)
    assert server.error == "unsupported protocol"
    assert client.error == "tlsv1 alert protocol version"


def test_tls_1_2_server() -> None:
    """Our client does not stoop to an older server."""
    context = standard_context(MINT, MINT.issue(SERVER), server=True)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client, server = our_client(MINT.issue(CLIENT)), Standard(context, server=True)
    join(client, server)
    assert not client.established
    assert server.error == "unsupported protocol"


def test_chacha20_client() -> None:
    """A suite that ztunnel does not have is not agreed on here either."""
    context = lax_context(MINT.issue(CLIENT))
    context.set_tls13_ciphersuites(b"TLS_CHACHA20_POLY1305_SHA256")
    client, server = Library(context, server=False), our_server(MINT.issue(SERVER))
    join(client, server)
    assert server.error == "no shared cipher"
    assert client.error == "tls alert handshake failure"


def test_aes_128_client() -> None:
    """The second suite is there for a peer that has just that."""
    context = lax_context(MINT.issue(CLIENT))
    context.set_tls13_ciphersuites(b"TLS_AES_128_GCM_SHA256")
    client, server = Library(context, server=False), our_server(MINT.issue(SERVER))
    join(client, server)
    assert server.established
    assert server.connection.get_cipher_name() == "TLS_AES_128_GCM_SHA256"


def test_client_that_offers_another_protocol() -> None:
    """The server answers the alert no_application_protocol, and the next client is served."""
    context = server_context(MINT.issue(SERVER))
    browser = lax_context(MINT.issue(CLIENT))
    browser.set_alpn_protos([b"http/1.1"])
    client, server = Library(browser, server=False), Library(context, server=True)
    join(client, server)
    assert server.error == "the peer offers no ALPN h2"
    assert client.error == "tlsv1 alert no application protocol"
    client, server = our_client(MINT.issue(CLIENT)), Library(context, server=True)
    join(client, server)
    assert server.established


def test_client_without_alpn() -> None:
    """A client that offers no protocol at all is refused right after the handshake."""
    client = Standard(standard_context(MINT, MINT.issue(CLIENT), alpn=None), server=False)
    server = our_server(MINT.issue(SERVER))
    join(client, server)
    assert server.established
    with pytest.raises(PeerRefused, match="no ALPN h2"):
        require_alpn(server.connection)


def test_server_without_alpn() -> None:
    """A server that leaves our offer unanswered is refused right after the handshake."""
    client = our_client(MINT.issue(CLIENT))
    context = standard_context(MINT, MINT.issue(SERVER), server=True, alpn=None)
    server = Standard(context, server=True)
    join(client, server)
    assert client.established
    with pytest.raises(PeerRefused, match="no ALPN h2"):
        require_alpn(client.connection)
