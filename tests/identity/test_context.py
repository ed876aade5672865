"""What the TLS contexts agree on, against themselves and against the ssl module."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from pyambient.identity.certificate import Certificate, IdentityError
from pyambient.identity.context import Contexts, client_context, require_alpn, server_context

from .tls import CLIENT, SERVER, Library, Mint, Standard, join, pem, standard_context


def our_ends(client: Certificate, server: Certificate) -> tuple[Library, Library]:
    return (
        Library(client_context(client), server=False),
        Library(server_context(server), server=True),
    )


def established(client: Library | Standard, server: Library | Standard) -> bool:
    join(client, server)
    assert (client.error, server.error) == (None, None)
    return client.established and server.established


def test_our_two_ends_agree_on_hbones_rules() -> None:
    """TLS 1.3, AES-256-GCM and h2, and each end sees the other's certificate."""
    mint = Mint()
    own, others = mint.issue(CLIENT), mint.issue(SERVER)
    client, server = our_ends(own, others)
    assert established(client, server)
    for end, shown in ((client, others), (server, own)):
        assert end.connection.get_protocol_version_name() == "TLSv1.3"
        assert end.connection.get_cipher_name() == "TLS_AES_256_GCM_SHA384"
        assert end.peer is not None
        assert pem(end.peer) == shown.chain[0]
        require_alpn(end.connection)


def test_no_server_name_is_sent() -> None:
    """The name in use inside, if any, does not reach the wire: ztunnel sends none either."""
    mint = Mint()
    client, server = our_ends(mint.issue(CLIENT), mint.issue(SERVER))
    assert established(client, server)
    assert server.connection.get_servername() is None


def test_client_of_another_library() -> None:
    """A client of another OpenSSL gets through with a certificate of the mesh."""
    mint = Mint()
    client = Standard(standard_context(mint, mint.issue(CLIENT)), server=False)
    server = Library(server_context(mint.issue(SERVER)), server=True)
    assert established(client, server)
    assert client.object.selected_alpn_protocol() == "h2"


def test_server_of_another_library() -> None:
    """A server of another OpenSSL is accepted by our client."""
    mint = Mint()
    client = Library(client_context(mint.issue(CLIENT)), server=False)
    server = Standard(standard_context(mint, mint.issue(SERVER), server=True), server=True)
    assert established(client, server)
    require_alpn(client.connection)


def test_intermediates_are_sent_and_the_root_is_not() -> None:
    """A chain through an intermediate verifies, with just leaf and intermediate sent.

    OpenSSL leaves the leaf out of what it shows a server, SSL_get_peer_cert_chain(3).
    """
    mint = Mint()
    between = Mint("between", parent=mint)
    client, server = our_ends(between.issue(CLIENT), mint.issue(SERVER))
    assert established(client, server)
    assert server.connection.get_peer_cert_chain(as_cryptography=True) == [between.certificate]
    assert client.connection.get_peer_cert_chain(as_cryptography=True) == [client.peer]


@pytest.mark.parametrize("separate", [True, False])
def test_every_root_is_trusted(separate: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """While a mesh changes roots, peers of either are let in, however the bundle is cut."""
    before, after = Mint("before"), Mint("after")
    roots = (pem(before.certificate), pem(after.certificate))
    bundle = roots if separate else (b"".join(roots),)
    client, server = our_ends(
        replace(before.issue(CLIENT), roots=bundle), replace(after.issue(SERVER), roots=bundle)
    )
    assert established(client, server)


def test_the_certificate_request_names_the_roots() -> None:
    """A client with several certificates can choose by the CA hints."""
    mint = Mint("mesh.example")
    client, server = our_ends(mint.issue(CLIENT), mint.issue(SERVER))
    assert established(client, server)
    hints = client.connection.get_client_ca_list(as_cryptography=True)
    assert hints == [mint.certificate.subject]


def test_a_batch_of_frames_is_one_write() -> None:
    """256 KiB go in with one call, and come out whole."""
    mint = Mint()
    client, server = our_ends(mint.issue(CLIENT), mint.issue(SERVER))
    assert established(client, server)
    batch = bytes(range(256)) * 1024
    assert client.connection.send(batch) == len(batch)
    join(client, server)
    assert server.received == batch


def test_renewal_leaves_live_connections_alone() -> None:
    """After a renewal the old connection goes on, and the next one shows the renewed leaf."""
    mint = Mint()
    contexts = Contexts()
    own = mint.issue(CLIENT)
    former, renewed = mint.issue(SERVER), mint.issue(SERVER)
    first = (
        Library(contexts.client(own), server=False),
        Library(contexts.server(former), server=True),
    )
    assert established(*first)
    second = (
        Library(contexts.client(own), server=False),
        Library(contexts.server(renewed), server=True),
    )
    assert established(*second)
    first[0].send(b"still here")
    join(*first)
    assert first[1].received == b"still here"
    assert second[0].peer is not None
    assert pem(second[0].peer) == renewed.chain[0]


class TestContexts:
    def test_one_context_per_certificate_and_role(self) -> None:
        """Every connection of a certificate shares its context."""
        certificate = Mint().issue(SERVER)
        contexts = Contexts()
        assert contexts.server(certificate) is contexts.server(certificate)
        assert contexts.client(certificate) is contexts.client(certificate)
        assert contexts.client(certificate) is not contexts.server(certificate)

    def test_contexts_go_with_their_certificate(self) -> None:
        """A certificate that is renewed or forgotten takes its contexts, and its key, along."""
        contexts = Contexts()
        certificate = Mint().issue(SERVER)
        contexts.server(certificate)
        contexts.client(certificate)
        assert repr(contexts) == "<Contexts 1 server, 1 client>"
        del certificate
        gc.collect()
        assert repr(contexts) == "<Contexts 0 server, 0 client>"


def test_unusable_certificate() -> None:
    """A part that is no PEM, or someone else's key, is an error that names the identity."""
    mint = Mint()
    good = mint.issue(SERVER)
    nonsense = (b"no certificate",)
    for wrong in (
        replace(good, private_key=mint.issue(CLIENT).private_key),
        replace(good, private_key=pem(rsa.generate_private_key(65537, 1024))),
        replace(good, private_key=pem(ed25519.Ed25519PrivateKey.generate())),
        replace(good, private_key=b"no key"),
        replace(good, chain=nonsense),
        replace(good, roots=nonsense),
    ):
        for make in (server_context, client_context):
            with pytest.raises(IdentityError, match=f"^the certificate for {SERVER} cannot be"):
                make(wrong)
