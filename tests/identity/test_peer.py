"""Who the peer is, by the SANs of its certificate."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from pyambient.identity.peer import PeerRefused, authenticate_client, authenticate_server
from pyambient.model.spiffe import SpiffeId

from .tls import CLIENT, SERVER, Mint, builder

MINT = Mint()
KEY = ec.generate_private_key(ec.SECP256R1())
FOREIGN = SpiffeId("other.example", "default", "client")


def certificate(*uris: object) -> x509.Certificate:
    return MINT.leaf(KEY, [str(uri) for uri in uris])


def unparsable() -> x509.Certificate:
    """A certificate whose SAN extension is not the sequence it must be."""
    san = x509.UnrecognizedExtension(x509.oid.ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"\x04\x01x")
    return (
        builder(x509.Name([]), MINT.subject, KEY.public_key())
        .add_extension(san, critical=True)
        .sign(MINT.key, hashes.SHA256())
    )


class TestClient:
    def test_identity_of_our_trust_domain(self) -> None:
        """The client is who its certificate says."""
        assert authenticate_client(certificate(CLIENT), "cluster.local") == CLIENT

    def test_other_trust_domain(self) -> None:
        """A client of another trust domain is refused though its chain verified."""
        with pytest.raises(PeerRefused, match=r"spiffe://other\.example/.* outside trust domain"):
            authenticate_client(certificate(FOREIGN), "cluster.local")

    @pytest.mark.parametrize("domain", ["cluster", "cluster.local.evil", "luster.local", ""])
    def test_trust_domain_is_compared_whole(self, domain: str) -> None:
        """Neither a prefix nor a suffix of the trust domain will do."""
        with pytest.raises(PeerRefused):
            authenticate_client(certificate(CLIENT), domain)

    def test_no_certificate(self) -> None:
        """Nobody is nobody, whatever the TLS library let through."""
        with pytest.raises(PeerRefused, match="no certificate"):
            authenticate_client(None, "cluster.local")

    def test_no_san(self) -> None:
        """A certificate for no name is refused."""
        with pytest.raises(PeerRefused, match="no SPIFFE id"):
            authenticate_client(certificate(), "cluster.local")

    @pytest.mark.parametrize(
        "uri",
        [
            "https://cluster.local/ns/default/sa/client",
            "spiffe://cluster.local/ns/default",
            "spiffe://cluster.local/ns/default/sa/client/extra",
            "spiffe://cluster.local/ns//sa/client",
            "spiffe://cluster.local/ns/default/sa/client?x=1",
            "spiffe://cluster.local@evil/ns/default/sa/client",
            "SPIFFE://cluster.local/ns/default/sa/client",
        ],
    )
    def test_uri_of_another_shape(self, uri: str) -> None:
        """What is not exactly Istio's shape is no identity."""
        with pytest.raises(PeerRefused, match="no SPIFFE id"):
            authenticate_client(certificate(uri), "cluster.local")

    def test_other_uris_are_passed_over(self) -> None:
        """URIs that are no SPIFFE ids do not hide the one that is."""
        shown = certificate("https://example.com", "spiffe://odd", CLIENT)
        assert authenticate_client(shown, "cluster.local") == CLIENT

    def test_first_of_several_ids_counts(self) -> None:
        """The peer is its first SPIFFE id, as for ztunnel."""
        assert authenticate_client(certificate(SERVER, CLIENT), "cluster.local") == SERVER

    def test_a_later_id_does_not_vouch_for_the_first(self) -> None:
        """The id that policies will see is the one whose trust domain is judged."""
        with pytest.raises(PeerRefused):
            authenticate_client(certificate(FOREIGN, CLIENT), "cluster.local")

    def test_unparsable_san(self) -> None:
        """A SAN extension of rubbish refuses the peer, and crashes nothing."""
        with pytest.raises(PeerRefused, match="cannot be parsed"):
            authenticate_client(unparsable(), "cluster.local")

    def test_spiffe_id_as_dns_name(self) -> None:
        """Only URI names carry identities."""
        names = x509.SubjectAlternativeName([x509.DNSName("cluster.local")])
        shown = (
            builder(x509.Name([]), MINT.subject, KEY.public_key())
            .add_extension(names, critical=True)
            .sign(MINT.key, hashes.SHA256())
        )
        with pytest.raises(PeerRefused, match="no SPIFFE id"):
            authenticate_client(shown, "cluster.local")


class TestServer:
    def test_expected_identity(self) -> None:
        """The server is one of those that the route expects."""
        assert authenticate_server(certificate(SERVER), {SERVER, CLIENT}) == SERVER

    def test_any_of_its_ids_may_be_expected(self) -> None:
        """A server that stands for a service besides itself is found by either id."""
        assert authenticate_server(certificate(CLIENT, SERVER), {SERVER}) == SERVER

    def test_unexpected_identity(self) -> None:
        """Another workload of the same mesh is refused, and the reason names both."""
        with pytest.raises(PeerRefused) as refused:
            authenticate_server(certificate(CLIENT), {SERVER})
        assert refused.value.reason == f"the server is {CLIENT}, expected {SERVER}"

    def test_nothing_expected(self) -> None:
        """No expectation means no server will do."""
        with pytest.raises(PeerRefused):
            authenticate_server(certificate(SERVER), frozenset())

    def test_trust_domain_is_part_of_the_identity(self) -> None:
        """The same account of another trust domain is someone else."""
        with pytest.raises(PeerRefused):
            authenticate_server(certificate(FOREIGN), {CLIENT})

    def test_no_certificate(self) -> None:
        """A server that shows no certificate is refused."""
        with pytest.raises(PeerRefused, match="no certificate"):
            authenticate_server(None, {SERVER})
