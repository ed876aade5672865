"""TLS contexts: HBONE's rules, fixed before the first connection.

pyOpenSSL freezes a context once a connection was made from it, so a renewed certificate means new
contexts; live connections keep the ones they were made with. What the rules are for:

* TLS 1.3 and AES-GCM only, ALPN exactly `h2`: what ztunnel offers and accepts.
* A client certificate is mandatory, and OpenSSL checks chain, times and purpose (clientAuth on
  the server, serverAuth on the client). There is no host name and no SNI. Who the peer is, is
  judged after the handshake: `peer.authenticate_client`, `peer.authenticate_server`.
* Resumption is off, for a resumed session brings no certificate to judge. It takes OP_NO_TICKET
  and SESS_CACHE_OFF together, each leaves one way open. The session id context changes nothing
  then; where sessions are kept, OpenSSL fails handshakes that offer one to a server without it.
"""

from __future__ import annotations

from typing import cast
from weakref import WeakKeyDictionary

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto

from .certificate import Certificate, IdentityError
from .peer import PeerRefused

ALPN = b"h2"
CIPHER_SUITES = b"TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256"

# openssl/ssl.h; cryptography binds the calls but not these names.
_MODE_ENABLE_PARTIAL_WRITE = 0x1
_MODE_NO_AUTO_CHAIN = 0x8


def server_context(certificate: Certificate) -> SSL.Context:
    """A new context to accept HBONE peers with; IdentityError if a part of it cannot be used."""
    context = _context(SSL.TLS_SERVER_METHOD, certificate)
    context.set_session_id(b"pyambient")
    context.set_alpn_select_callback(_select_alpn)
    for root in _load(certificate.roots):
        context.add_client_ca(root)
    return context


def client_context(certificate: Certificate) -> SSL.Context:
    """A new context to open HBONE tunnels with; IdentityError if a part of it cannot be used."""
    context = _context(SSL.TLS_CLIENT_METHOD, certificate)
    context.set_alpn_protos([ALPN])
    return context


def require_alpn(connection: SSL.Connection) -> None:
    """Refuse a peer that agreed on no `h2`; for both sides, after the handshake.

    A client without the ALPN extension never reaches the server's select callback, and a server
    may leave a client's offer unanswered (RFC 7301 section 3.2).
    """
    if connection.get_alpn_proto_negotiated() != ALPN:
        raise PeerRefused("the peer does not speak HTTP/2 (no ALPN h2)")


class Contexts:
    """The contexts of the certificates in use, each built once and kept as long as they are."""

    def __init__(self) -> None:
        self._servers: WeakKeyDictionary[Certificate, SSL.Context] = WeakKeyDictionary()
        self._clients: WeakKeyDictionary[Certificate, SSL.Context] = WeakKeyDictionary()

    def server(self, certificate: Certificate) -> SSL.Context:
        context = self._servers.get(certificate)
        if context is None:
            context = self._servers[certificate] = server_context(certificate)
        return context

    def client(self, certificate: Certificate) -> SSL.Context:
        context = self._clients.get(certificate)
        if context is None:
            context = self._clients[certificate] = client_context(certificate)
        return context

    def __repr__(self) -> str:
        return f"<Contexts {len(self._servers)} server, {len(self._clients)} client>"


def _context(method: int, certificate: Certificate) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(CIPHER_SUITES)
    context.set_options(SSL.OP_NO_TICKET)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    # An idle tunnel then holds no record buffers, 33 KiB of the 72 an end costs.
    context.set_mode(SSL.MODE_RELEASE_BUFFERS | _MODE_NO_AUTO_CHAIN)
    # One SSL_write then takes a whole batch of frames, not one record of 16 KiB.
    context.clear_mode(_MODE_ENABLE_PARTIAL_WRITE)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    try:
        _use(context, certificate)
    except (SSL.Error, crypto.Error, ValueError, TypeError) as error:
        raise IdentityError(
            f"the certificate for {certificate.identity} cannot be used ({error})",
            "check what the authority issues",
        ) from None
    return context


def _use(context: SSL.Context, certificate: Certificate) -> None:
    leaf, *intermediates = _load(certificate.chain)
    key = load_pem_private_key(certificate.private_key, password=None)
    if not isinstance(key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)):
        raise TypeError(f"its key is of a kind that is not used here: {type(key).__name__}")
    context.use_certificate(leaf)
    context.use_privatekey(key)
    context.check_privatekey()
    for intermediate in intermediates:
        context.add_extra_chain_cert(intermediate)
    anchors = cast("crypto.X509Store", context.get_cert_store())
    for root in _load(certificate.roots):
        anchors.add_cert(crypto.X509.from_cryptography(root))


def _load(pems: tuple[bytes, ...]) -> list[x509.Certificate]:
    return [found for pem in pems for found in x509.load_pem_x509_certificates(pem)]


def _select_alpn(_connection: SSL.Connection, offered: list[bytes]) -> bytes:
    """Choose `h2`; raising makes OpenSSL send the fatal alert no_application_protocol.

    pyOpenSSL hands the exception to the caller of `do_handshake`, as an SSL.Error like any other.
    """
    if ALPN not in offered:
        raise SSL.Error([("SSL routines", "", "the peer offers no ALPN h2")])
    return ALPN
