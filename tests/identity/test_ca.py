"""The embedded authority: its root on disk, and what it signs."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pyambient.errors import UsageError
from pyambient.identity import ca
from pyambient.identity.ca import EmbeddedAuthority
from pyambient.identity.certificate import Certificate, IdentityError
from pyambient.identity.context import client_context, server_context
from pyambient.model.spiffe import SpiffeId

from .tls import CLIENT, DAY, SERVER, Library, Mint, join, pem


def open_authority(directory: Path, **options: timedelta) -> EmbeddedAuthority:
    return EmbeddedAuthority.open(directory, "cluster.local", **options)


def sign(authority: EmbeddedAuthority, identity: SpiffeId = CLIENT) -> Certificate:
    return trio.run(authority.sign, identity)


def leaf_of(certificate: Certificate) -> x509.Certificate:
    return x509.load_pem_x509_certificate(certificate.chain[0])


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestRoot:
    def test_first_start_makes_a_root(self, tmp_path: Path) -> None:
        """It is a P-256 authority of the trust domain's name, for ten years."""
        root = x509.load_pem_x509_certificate(open_authority(tmp_path / "ca").root_pem)
        (name,) = root.subject
        assert (name.oid, name.value) == (NameOID.ORGANIZATION_NAME, "cluster.local")
        key = root.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP256R1)
        assert root.not_valid_after_utc > datetime.now(UTC) + timedelta(days=3649)
        constraints = root.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert constraints.value.ca

    def test_only_the_owner_may_read_it(self, tmp_path: Path) -> None:
        """The key is kept 0600 in a 0700 directory, whatever the umask."""
        former = os.umask(0)
        try:
            open_authority(tmp_path / "a" / "ca")
        finally:
            os.umask(former)
        assert mode_of(tmp_path / "a" / "ca") == 0o700
        assert mode_of(tmp_path / "a" / "ca" / "root.pem") == 0o600

    def test_later_starts_load_it(self, tmp_path: Path) -> None:
        """The root stays the same, and nothing else is left in the directory."""
        first = open_authority(tmp_path)
        assert open_authority(tmp_path).root_pem == first.root_pem
        assert {path.name for path in tmp_path.iterdir()} == {"root.pem", "root.lock"}

    def test_read_only_copy(self, tmp_path: Path) -> None:
        """A root that someone put there needs neither the lock nor leave to write."""
        put_root(tmp_path, Mint())
        (tmp_path / "root.pem").chmod(0o400)
        open_authority(tmp_path)
        assert not (tmp_path / "root.lock").exists()

    def test_starts_that_race_share_one_root(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of several that find no root at once, one makes it and the others load that."""
        made = []
        barrier = threading.Barrier(4)

        def slow_new_root(trust_domain: str) -> ca._Root:
            made.append(trust_domain)
            time.sleep(0.02)
            return new_root(trust_domain)

        def start(_: int) -> bytes:
            barrier.wait()
            return open_authority(tmp_path / "ca").root_pem

        new_root = ca._new_root
        monkeypatch.setattr(ca, "_new_root", slow_new_root)
        with ThreadPoolExecutor(4) as pool:
            roots = set(pool.map(start, range(4)))
        assert len(roots) == 1
        assert made == ["cluster.local"]

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A root that cannot be written whole is not left there in part."""

        def no_space(_fd: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(UsageError, match="cannot be used: No space left on device; choose"):
            open_authority(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"root.lock"}

    def test_trust_domain_must_be_one(self, tmp_path: Path) -> None:
        """What cannot stand in a SPIFFE id is refused before anything is written."""
        with pytest.raises(UsageError, match="cannot be a trust domain"):
            EmbeddedAuthority.open(tmp_path / "ca", "Cluster/Local")
        assert not (tmp_path / "ca").exists()


def put_root(directory: Path, mint: Mint, *, key: bytes | None = None) -> Path:
    """Write a root file as an operator would."""
    path = directory / "root.pem"
    path.touch(mode=0o600)
    path.write_bytes(pem(mint.certificate) + (key or pem(mint.key)))
    return path


class TestRefusedRoot:
    """Each with one line that says what to do, and the file left as it was."""

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o700])
    def test_permissions_too_wide(self, tmp_path: Path, mode: int) -> None:
        """A key that others may read is not used."""
        path = put_root(tmp_path, Mint())
        path.chmod(mode)
        with pytest.raises(UsageError, match=f"run: chmod 600 {path}$"):
            open_authority(tmp_path)

    def test_directory_others_may_write(self, tmp_path: Path) -> None:
        """A root that others may replace is not used."""
        directory = tmp_path / "ca"
        directory.mkdir()
        put_root(directory, Mint())
        directory.chmod(0o777)
        with pytest.raises(UsageError, match=f"run: chmod 700 {directory}$"):
            open_authority(directory)

    def test_owned_by_another_user(self, tmp_path: Path) -> None:
        """A root that an unprivileged user put there is not used."""
        path = put_root(tmp_path, Mint())
        os.chown(path, 65534, -1)
        with pytest.raises(UsageError, match="belongs to another user"):
            open_authority(tmp_path)

    def test_key_of_another_certificate(self, tmp_path: Path) -> None:
        """Leaves signed with it would verify nowhere."""
        put_root(tmp_path, Mint(), key=pem(Mint().key))
        with pytest.raises(UsageError, match="is not the key of the certificate"):
            open_authority(tmp_path)

    def test_expired(self, tmp_path: Path) -> None:
        """An expired root is named, not renewed behind the back of the mesh."""
        path = put_root(tmp_path, Mint(age=2 * DAY))
        before = path.read_bytes()
        with pytest.raises(UsageError, match="has expired; remove it"):
            open_authority(tmp_path)
        assert path.read_bytes() == before

    def test_not_valid_yet(self, tmp_path: Path) -> None:
        """A root from the future points to the clock."""
        put_root(tmp_path, Mint(age=-DAY))
        with pytest.raises(UsageError, match="not valid yet; check this machine's clock"):
            open_authority(tmp_path)

    def test_leaf_instead_of_a_root(self, tmp_path: Path) -> None:
        """A certificate that may not sign is refused."""
        mint = Mint()
        mint.certificate = mint.leaf(mint.key, [str(CLIENT)])
        put_root(tmp_path, mint)
        with pytest.raises(UsageError, match="not one of an authority"):
            open_authority(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"rubbish", pem(Mint().certificate), pem(Mint().key)])
    def test_not_a_key_and_a_certificate(self, tmp_path: Path, content: bytes) -> None:
        """A torn or foreign file is refused."""
        path = tmp_path / "root.pem"
        path.touch(mode=0o600)
        path.write_bytes(content)
        with pytest.raises(UsageError, match="is not one private key"):
            open_authority(tmp_path)
        assert path.read_bytes() == content

    def test_directory_is_a_file(self, tmp_path: Path) -> None:
        """A path that cannot be a directory is one line too."""
        (tmp_path / "ca").touch()
        with pytest.raises(UsageError, match="cannot be used: Not a directory"):
            open_authority(tmp_path / "ca")


class TestLeaf:
    def test_shape_is_istiods(self, tmp_path: Path) -> None:
        """No subject, one critical SPIFFE URI, both purposes, and not an authority."""
        leaf = leaf_of(sign(open_authority(tmp_path)))
        assert not list(leaf.subject)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert names.critical
        assert list(names.value) == [x509.UniformResourceIdentifier(str(CLIENT))]
        purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
        assert set(purposes.value) == {
            ExtendedKeyUsageOID.SERVER_AUTH,
            ExtendedKeyUsageOID.CLIENT_AUTH,
        }
        constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert not constraints.value.ca

    def test_lifetime(self, tmp_path: Path) -> None:
        """A day from now, and a little from before, for peers whose clock lags."""
        before = datetime.now(UTC)
        certificate = sign(open_authority(tmp_path))
        assert certificate.not_after >= before + DAY - timedelta(seconds=1)
        assert certificate.not_after <= datetime.now(UTC) + DAY
        assert certificate.not_before <= before - timedelta(minutes=1)
        assert before + timedelta(hours=11) < certificate.renew_at < before + timedelta(hours=12)

    def test_short_lifetime_has_its_half_life_ahead(self, tmp_path: Path) -> None:
        """A leaf of ten seconds is not born due for renewal."""
        authority = open_authority(tmp_path, leaf_lifetime=timedelta(seconds=10))
        assert sign(authority).renew_at > datetime.now(UTC) + timedelta(seconds=2)

    def test_leaf_ends_with_its_root(self, tmp_path: Path) -> None:
        """No leaf outlives the root it is checked against."""
        mint = Mint()
        put_root(tmp_path, mint)
        authority = open_authority(tmp_path, leaf_lifetime=30 * DAY)
        assert sign(authority).not_after == mint.certificate.not_valid_after_utc

    def test_fresh_key_and_serial_each_time(self, tmp_path: Path) -> None:
        """Two leaves of one identity share nothing but the name."""
        authority = open_authority(tmp_path)
        one, two = sign(authority), sign(authority)
        assert one.private_key != two.private_key
        assert leaf_of(one).serial_number != leaf_of(two).serial_number

    def test_key_belongs_to_the_leaf(self, tmp_path: Path) -> None:
        """The private key is P-256 and the leaf's own."""
        certificate = sign(open_authority(tmp_path))
        key = load_pem_private_key(certificate.private_key, password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.public_key() == leaf_of(certificate).public_key()

    def test_two_leaves_shake_hands(self, tmp_path: Path) -> None:
        """What the authority issues serves a client and a server of the mesh."""
        authority = open_authority(tmp_path)
        client = Library(client_context(sign(authority, CLIENT)), server=False)
        server = Library(server_context(sign(authority, SERVER)), server=True)
        join(client, server)
        assert (client.error, server.error) == (None, None)
        assert server.established

    def test_other_trust_domain(self, tmp_path: Path) -> None:
        """The authority vouches for its own trust domain only."""
        with pytest.raises(IdentityError, match=r"signs for trust domain 'cluster\.local'"):
            sign(open_authority(tmp_path), SpiffeId("other.example", "default", "client"))

    def test_private_keys_stay_out_of_reprs(self, tmp_path: Path) -> None:
        """A certificate in a log line or a traceback does not give its key away."""
        authority = open_authority(tmp_path)
        assert "PRIVATE" not in repr(sign(authority)) + repr(authority)
        assert repr(authority).startswith("<EmbeddedAuthority cluster.local, root expires ")


class TestFromPem:
    def test_leaf_for_someone_else(self) -> None:
        """An authority's answer for another identity is not taken."""
        issued = Mint().issue(SERVER)
        with pytest.raises(IdentityError, match=f"a certificate for {SERVER}, not {CLIENT}"):
            Certificate.from_pem(CLIENT, issued.private_key, issued.chain, issued.roots)

    @pytest.mark.parametrize("chain", [(), (b"rubbish",)])
    def test_no_leaf(self, chain: tuple[bytes, ...]) -> None:
        """An answer without a certificate is an error, not a crash."""
        with pytest.raises(IdentityError, match="holds no certificate"):
            Certificate.from_pem(CLIENT, b"", chain, ())
