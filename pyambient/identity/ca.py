"""The embedded certificate authority: a root on disk, leaves like istiod's.

General theory of operation
---------------------------
The root is one file, `root.pem`, that holds the private key and the certificate: a pair that is
renamed into place as one can never be found torn. Whoever starts first makes it, under a lock in
the same directory; a process that loses the race loads what the winner made. An operator may put
a root of their own there (two nodes that share a mesh share a copy), so loading takes nothing on
trust: a root that leaves could not be checked against, or that others could have read, is refused
with one line, never replaced.

Leaves are what istiod issues: a fresh P-256 key each, an empty subject and hence a critical SAN
(RFC 5280 section 4.2.1.6) with the one SPIFFE URI, for servers and clients, valid from a little
ago so that a peer whose clock lags accepts them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pyambient.errors import UsageError
from pyambient.model.spiffe import SpiffeId

from .certificate import Certificate, IdentityError

LEAF_LIFETIME = timedelta(hours=24)
ROOT_LIFETIME = timedelta(days=3650)
CLOCK_SKEW = timedelta(minutes=2)

_ROOT_FILE = "root.pem"
_LOCK_FILE = "root.lock"
_MAX_ROOT_SIZE = 64 << 10
_LEAF_PURPOSES = x509.ExtendedKeyUsage(
    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
)

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class _Root:
    key: SigningKey
    certificate: x509.Certificate

    def pem(self) -> bytes:
        return _key_pem(self.key) + self.certificate.public_bytes(Encoding.PEM)


class EmbeddedAuthority:
    """Signs for every identity of one trust domain; an `Authority` without a network."""

    def __init__(
        self, root: _Root, trust_domain: str, leaf_lifetime: timedelta = LEAF_LIFETIME
    ) -> None:
        self.trust_domain = trust_domain
        self.leaf_lifetime = leaf_lifetime
        self.root_pem = root.certificate.public_bytes(Encoding.PEM)
        self._root = root
        self._issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key())

    @classmethod
    def open(
        cls, directory: Path, trust_domain: str, leaf_lifetime: timedelta = LEAF_LIFETIME
    ) -> EmbeddedAuthority:
        """Load the root in `directory`, or make both; UsageError for a root of no use."""
        _check_trust_domain(trust_domain)
        path = directory / _ROOT_FILE
        try:
            root = _load(path) or _load_or_create(path, trust_domain)
        except OSError as error:
            raise UsageError(
                f"the CA directory {directory} cannot be used: {error.strerror}",
                "choose one that this user may write",
            ) from None
        return cls(root, trust_domain, leaf_lifetime)

    async def sign(self, identity: SpiffeId) -> Certificate:
        """A new key and a leaf for it; a fraction of a millisecond, so it does not yield."""
        if identity.trust_domain != self.trust_domain:
            raise IdentityError(
                f"this authority signs for trust domain {self.trust_domain!r}, not for {identity}",
                "give all nodes of the mesh one trust domain",
            )
        now = datetime.now(UTC)
        until = min(now + self.leaf_lifetime, self._root.certificate.not_valid_after_utc)
        if until <= now:
            raise IdentityError(
                "the root certificate has expired", f"remove {_ROOT_FILE} and restart every node"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._leaf(identity, key.public_key(), now, until)
        return Certificate(
            identity,
            _key_pem(key),
            (leaf.public_bytes(Encoding.PEM),),
            (self.root_pem,),
            leaf.not_valid_before_utc,
            leaf.not_valid_after_utc,
        )

    def _leaf(
        self, identity: SpiffeId, key: ec.EllipticCurvePublicKey, now: datetime, until: datetime
    ) -> x509.Certificate:
        # A leaf that lives for seconds must not begin past its own half-life.
        skew = min(CLOCK_SKEW, self.leaf_lifetime / 10)
        name = x509.UniformResourceIdentifier(str(identity))
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._root.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - skew)
            .not_valid_after(until)
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(_LEAF_PURPOSES, critical=False)
            .add_extension(self._issuer, critical=False)
            .sign(self._root.key, hashes.SHA256())
        )

    def __repr__(self) -> str:
        expiry = self._root.certificate.not_valid_after_utc
        return f"<EmbeddedAuthority {self.trust_domain}, root expires {expiry:%Y-%m-%d}>"


def _check_trust_domain(trust_domain: str) -> None:
    try:
        SpiffeId.parse(f"spiffe://{trust_domain}/ns/a/sa/a")
    except ValueError:
        raise UsageError(
            f"{trust_domain!r} cannot be a trust domain",
            "use lower-case letters, digits, dots, dashes and underscores, as in cluster.local",
        ) from None


def _load(path: Path) -> _Root | None:
    """The root in `path`, or None if there is no such file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        _check_permissions(path, os.fstat(file.fileno()))
        text = file.read(_MAX_ROOT_SIZE)
    root = _parse(path, text)
    _check_root(path, root)
    return root


def _check_permissions(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise UsageError(f"{path} belongs to another user", f"run: chown root {path}")
    if status.st_mode & 0o177:
        raise UsageError(
            f"{path} holds the root's private key and its permissions are wider than 0600",
            f"run: chmod 600 {path}",
        )
    if path.parent.stat().st_mode & 0o022:
        raise UsageError(
            f"others may replace {path}, for they may write its directory",
            f"run: chmod 700 {path.parent}",
        )


def _parse(path: Path, text: bytes) -> _Root:
    try:
        certificates = x509.load_pem_x509_certificates(text)
        key = load_pem_private_key(text, password=None)
    except (ValueError, TypeError):
        certificates, key = [], None
    if len(certificates) != 1 or not isinstance(key, SigningKey):
        raise UsageError(
            f"{path} is not one private key (EC or RSA) and one certificate in PEM",
            "restore it from a copy, or remove it to start a mesh with a root of its own",
        )
    return _Root(key, certificates[0])


def _check_root(path: Path, root: _Root) -> None:
    now = datetime.now(UTC)
    if root.key.public_key() != root.certificate.public_key():
        raise UsageError(
            f"the private key in {path} is not the key of the certificate there",
            "restore both from one copy",
        )
    if now >= root.certificate.not_valid_after_utc:
        raise UsageError(
            f"the root certificate in {path} has expired",
            "remove it to make another one, and restart every node of the mesh",
        )
    if now < root.certificate.not_valid_before_utc:
        raise UsageError(
            f"the root certificate in {path} is not valid yet", "check this machine's clock"
        )
    if not _may_sign(root.certificate):
        raise UsageError(
            f"the certificate in {path} is not one of an authority (basicConstraints CA:TRUE)",
            "put a CA certificate there",
        )


def _may_sign(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return False


def _load_or_create(path: Path, trust_domain: str) -> _Root:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path.parent / _LOCK_FILE):
        root = _load(path)
        if root is None:
            root = _new_root(trust_domain)
            _write(path, root.pem())
        return root


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file; the kernel lets go of it should we die."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _new_root(trust_domain: str) -> _Root:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + ROOT_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _Root(key, certificate)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    """What Istio sets: a root signs certificates and CRLs, a leaf takes part in handshakes."""
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=not ca,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _write(path: Path, content: bytes) -> None:
    """Put `content` in place whole, 0600 from its first byte (mkstemp), or leave nothing."""
    fd, temporary = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).rename(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _key_pem(key: SigningKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
