"""Two TLS ends joined in memory, and certificates of every wrong kind."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL

from pyambient.identity.certificate import Certificate
from pyambient.model.spiffe import SpiffeId

CLIENT = SpiffeId("cluster.local", "default", "client")
SERVER = SpiffeId("cluster.local", "default", "server")
BOTH_PURPOSES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
DAY = timedelta(days=1)


def pem(item: x509.Certificate | PrivateKeyTypes) -> bytes:
    """A certificate or a private key in PEM."""
    if isinstance(item, x509.Certificate):
        return item.public_bytes(Encoding.PEM)
    return item.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@dataclass
class Mint:
    """An authority that also signs what a real one would not; `parent` makes it an intermediate."""

    name: str = "cluster.local"
    parent: Mint | None = None
    age: timedelta = timedelta(minutes=2)
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    def __post_init__(self) -> None:
        self.subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, self.name)])
        signer = self.parent or self
        self.certificate = (
            builder(self.subject, signer.subject, self.key.public_key(), age=self.age)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(signer.key, hashes.SHA256())
        )

    @property
    def root(self) -> Mint:
        return self.parent.root if self.parent else self

    def leaf(
        self,
        key: ec.EllipticCurvePrivateKey,
        uris: Sequence[str],
        *,
        purposes: Sequence[x509.ObjectIdentifier] = BOTH_PURPOSES,
        age: timedelta = timedelta(minutes=2),
        lifetime: timedelta = DAY,
    ) -> x509.Certificate:
        """A leaf `age` old that lives for `lifetime`; no URIs means no SAN at all."""
        made = builder(x509.Name([]), self.subject, key.public_key(), age=age, lifetime=lifetime)
        if uris:
            names = [x509.UniformResourceIdentifier(uri) for uri in uris]
            made = made.add_extension(x509.SubjectAlternativeName(names), critical=True)
        if purposes:
            made = made.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        return made.sign(self.key, hashes.SHA256())

    def issue(
        self,
        identity: SpiffeId,
        *,
        purposes: Sequence[x509.ObjectIdentifier] = BOTH_PURPOSES,
        age: timedelta = timedelta(minutes=2),
        lifetime: timedelta = DAY,
    ) -> Certificate:
        """A `Certificate` for `identity`, with the intermediates up to the root."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self.leaf(key, [str(identity)], purposes=purposes, age=age, lifetime=lifetime)
        chain, mint = [pem(leaf)], self
        while mint.parent is not None:
            chain.append(pem(mint.certificate))
            mint = mint.parent
        return Certificate.from_pem(identity, pem(key), chain, [pem(mint.certificate)])


def builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    *,
    age: timedelta = timedelta(minutes=2),
    lifetime: timedelta = DAY,
) -> x509.CertificateBuilder:
    born = datetime.now(UTC) - age
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(born)
        .not_valid_after(born + lifetime)
    )


class Library:
    """An end made with pyOpenSSL; `error` is why it gave up, in OpenSSL's words."""

    def __init__(self, context: SSL.Context, *, server: bool) -> None:
        self.connection = SSL.Connection(context, None)
        if server:
            self.connection.set_accept_state()
        else:
            self.connection.set_connect_state()
        self.established = False
        self.error: str | None = None
        self.received = b""

    def advance(self) -> None:
        """Shake hands, or read what there is, until bytes of the peer are needed."""
        if self.error is not None:
            return
        try:
            if not self.established:
                self.connection.do_handshake()
                self.established = True
            while True:
                self.received += self.connection.recv(65536)
        except SSL.WantReadError:
            pass
        except SSL.Error as error:
            self.error = error.args[0][-1][-1] if error.args else repr(error)

    def output(self) -> bytes:
        try:
            return self.connection.bio_read(1 << 20)
        except SSL.WantReadError:
            return b""

    def input(self, data: bytes) -> None:
        self.connection.bio_write(data)

    def send(self, data: bytes) -> None:
        self.connection.send(data)

    @property
    def peer(self) -> x509.Certificate | None:
        return self.connection.get_peer_certificate(as_cryptography=True)


class Standard:
    """An end made with Python's own ssl module, which links another OpenSSL."""

    def __init__(
        self, context: ssl.SSLContext, *, server: bool, session: ssl.SSLSession | None = None
    ) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self._in, self._out, server_side=server, session=session)
        self.established = False
        self.error: str | None = None
        self.received = b""

    def advance(self) -> None:
        if self.error is not None:
            return
        try:
            if not self.established:
                self.object.do_handshake()
                self.established = True
            while data := self.object.read(65536):
                self.received += data
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.error = str(error.reason).lower().replace("_", " ")

    def output(self) -> bytes:
        return self._out.read()

    def input(self, data: bytes) -> None:
        self._in.write(data)

    def send(self, data: bytes) -> None:
        self.object.write(data)


End = Library | Standard


def join(client: End, server: End) -> None:
    """Carry bytes between the ends until neither has any more to say."""
    for _ in range(20):
        client.advance()
        to_server = client.output()
        if to_server:
            server.input(to_server)
        server.advance()
        to_client = server.output()
        if to_client:
            client.input(to_client)
        if not to_server and not to_client:
            return
    raise AssertionError("the ends never stopped talking")


def standard_context(
    mint: Mint, certificate: Certificate | None, *, server: bool = False, alpn: str | None = "h2"
) -> ssl.SSLContext:
    """A context of the ssl module that trusts `mint` and checks no host name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=pem(mint.root.certificate).decode())
    if alpn is not None:
        context.set_alpn_protocols([alpn])
    if certificate is not None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(certificate.private_key + b"".join(certificate.chain))
            file.flush()
            context.load_cert_chain(file.name)
    return context


def show(holder: SSL.Context | SSL.Connection, certificate: Certificate) -> None:
    """Let a context or one connection present `certificate`."""
    key = load_pem_private_key(certificate.private_key, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    holder.use_certificate(x509.load_pem_x509_certificate(certificate.chain[0]))
    holder.use_privatekey(key)


def lax_context(certificate: Certificate | None, *, server: bool = False) -> SSL.Context:
    """A pyOpenSSL context with h2 and a certificate or none, and OpenSSL's defaults else."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD if server else SSL.TLS_CLIENT_METHOD)
    if certificate is not None:
        show(context, certificate)
    context.set_session_id(b"lax")
    context.set_alpn_protos([b"h2"])
    context.set_alpn_select_callback(lambda _connection, _offered: b"h2")
    return context
