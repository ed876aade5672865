"""An HBONE client that nobody here wrote: stdlib ssl and hyper-h2, free to break every rule.

The functions run in a pod's process (`BedPod.run`), so they take and return plain values.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import h2.config
import h2.connection
import h2.events
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pyambient.model.address import SocketAddress

TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client proves itself with; `chain` and `key` may be empty for none."""

    chain: bytes
    key: bytes
    root: bytes


@dataclass(slots=True)
class Outcome:
    """What the attacker saw: the TLS failure, the HTTP answers, or just the end."""

    tls_error: str = ""
    statuses: list[int] = field(default_factory=list)
    frames: int = 0
    closed: bool = False
    data: bytes = b""
    resumed: bool = False


def issue(ca_dir: Path, uri: str | None) -> Credentials:
    """A leaf of the mesh's own CA with any URI SAN, or with a DNS name only."""
    root = (ca_dir / "root.pem").read_bytes()
    return _sign(root, uri)


def other_authority(uri: str, issuer: str) -> Credentials:
    """A leaf of a CA of that name which the mesh does not know."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, issuer)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _sign(_private(key) + certificate.public_bytes(Encoding.PEM), uri)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _sign(root_pem: bytes, uri: str | None) -> Credentials:
    root_key = load_pem_private_key(root_pem, None)
    assert isinstance(root_key, ec.EllipticCurvePrivateKey)
    root = x509.load_pem_x509_certificate(root_pem)
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    san = x509.DNSName("client.example") if uri is None else x509.UniformResourceIdentifier(uri)
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(root.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([san]), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .sign(root_key, hashes.SHA256())
    )
    anchor = root.public_bytes(Encoding.PEM)
    return Credentials(leaf.public_bytes(Encoding.PEM), _private(key), anchor)


def context(credentials: Credentials, *, server: bool = False) -> ssl.SSLContext:
    """TLS 1.3 with ALPN h2 and no host name check, as HBONE has it."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_verify_locations(cadata=credentials.root.decode())
    made.set_alpn_protocols(["h2"])
    if credentials.chain:
        with tempfile.NamedTemporaryFile() as file:
            file.write(credentials.key + credentials.chain)
            file.flush()
            made.load_cert_chain(file.name)
    return made


Headers = list[tuple[str, str]]


def connect_headers(authority: str) -> Headers:
    return [(":method", "CONNECT"), (":authority", authority)]


def attack(to: SocketAddress, credentials: Credentials, *requests: Headers) -> Outcome:
    """Handshake, send each request on a stream of its own, report what comes back."""
    outcome = Outcome()
    with _tls(to, context(credentials), outcome) as tls:
        if tls is not None:
            _converse(tls, outcome, list(requests))
    return outcome


def resume(to: SocketAddress, credentials: Credentials, authority: str) -> list[Outcome]:
    """Two connections with one TLS session offered again: the second could skip every check."""
    shared = context(credentials)
    outcomes, session = [], None
    for _ in range(2):
        outcome = Outcome()
        with _tls(to, shared, outcome, session) as tls:
            if tls is not None:
                _converse(tls, outcome, [connect_headers(authority)], b"resumed?")
                session, outcome.resumed = tls.session, bool(tls.session_reused)
        outcomes.append(outcome)
    return outcomes


@contextlib.contextmanager
def _tls(to, made, outcome, session=None):
    with socket.create_connection(to, TIMEOUT) as tcp:
        try:
            tls = made.wrap_socket(tcp, session=session)
        except (ssl.SSLError, OSError) as error:
            outcome.tls_error = str(error)
            yield None
            return
        with tls:
            yield tls


def _converse(
    tls: ssl.SSLSocket, outcome: Outcome, requests: list[Headers], data: bytes = b""
) -> None:
    """Send what validation would forbid, too; stop when all is answered or the peer closes."""
    config = h2.config.H2Configuration(
        client_side=True,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        validate_inbound_headers=False,
    )
    connection = h2.connection.H2Connection(config)
    connection.initiate_connection()
    for headers in requests:
        connection.send_headers(connection.get_next_available_stream_id(), headers)
    try:
        tls.sendall(connection.data_to_send())
        _read_answers(tls, connection, outcome, len(requests), data)
    except ssl.SSLError as error:
        outcome.tls_error = str(error)
    except OSError:
        outcome.closed = True


def _read_answers(tls, connection, outcome, wanted: int, data: bytes) -> None:
    while len(outcome.statuses) < wanted or len(outcome.data) < len(data):
        raw = tls.recv(1 << 16)
        if not raw:
            outcome.closed = True
            return
        outcome.frames += 1
        for event in connection.receive_data(raw):
            if isinstance(event, h2.events.ResponseReceived):
                status = int(dict(event.headers)[b":status"])
                outcome.statuses.append(status)
                if data and status == 200:
                    connection.send_data(event.stream_id, data)
            elif isinstance(event, h2.events.DataReceived):
                outcome.data += event.data
        tls.sendall(connection.data_to_send())


def impostor(channel, port: int, credentials: Credentials) -> None:
    """A server with a certificate of the mesh's CA, but for somebody else.

    Sends what it received after the handshake of each connection, until that ends.
    """
    made = context(credentials, server=True)
    with socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        channel.send("listening")
        while True:
            tcp, _ = server.accept()
            received = b""
            with tcp, contextlib.suppress(OSError), made.wrap_socket(tcp, server_side=True) as tls:
                tls.settimeout(TIMEOUT)
                while chunk := tls.recv(1 << 16):
                    received += chunk
            channel.send(received)
