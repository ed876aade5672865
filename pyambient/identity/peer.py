"""Who is on the other end of a handshake that succeeded.

OpenSSL has checked the chain, the times and the purpose by then; what it cannot do is compare
URI SANs. These checks therefore read the certificate after the handshake of every connection,
never in a verify callback: OpenSSL skips that callback when a session is resumed.
"""

from __future__ import annotations

from collections.abc import Collection

from cryptography import x509

from pyambient.model.spiffe import SpiffeId

from .certificate import join_ids
from .certificate import spiffe_ids as _spiffe_ids


class PeerRefused(Exception):
    """The peer must not be talked to; `reason` is for the log, the peer just sees a close."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def spiffe_ids(certificate: x509.Certificate | None) -> tuple[SpiffeId, ...]:
    """The peer's SPIFFE ids, at least one; PeerRefused without them."""
    if certificate is None:
        raise PeerRefused("the peer presented no certificate")
    try:
        found = _spiffe_ids(certificate)
    except ValueError as error:
        raise PeerRefused(f"the peer's certificate cannot be parsed: {error}") from None
    if not found:
        raise PeerRefused("the peer's certificate has no SPIFFE id")
    return found


def authenticate_client(certificate: x509.Certificate | None, trust_domain: str) -> SpiffeId:
    """The client's identity: its first SPIFFE id, which must be of our trust domain.

    ztunnel lets any of several ids satisfy the trust domain and then acts on the first. We judge
    the id that policies will see, so that one certificate cannot pass with one id and act with
    another.
    """
    identity = spiffe_ids(certificate)[0]
    if identity.trust_domain != trust_domain:
        raise PeerRefused(f"the client is {identity}, outside trust domain {trust_domain!r}")
    return identity


def authenticate_server(
    certificate: x509.Certificate | None, expected: Collection[SpiffeId]
) -> SpiffeId:
    """The first of the server's SPIFFE ids that is expected; none expected refuses everyone."""
    found = spiffe_ids(certificate)
    for identity in found:
        if identity in expected:
            return identity
    raise PeerRefused(f"the server is {join_ids(found)}, expected {join_ids(expected)}")
