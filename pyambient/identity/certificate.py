"""A workload's certificate as a value, and the rules of X.509 for SPIFFE."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from cryptography import x509

from pyambient.errors import PyambientError
from pyambient.model.spiffe import SpiffeId


class IdentityError(PyambientError):
    """No certificate for an identity: the authority failed, or answered with one of no use."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Certificate:
    """What a workload proves its identity with, and whom it trusts; all parts are PEM.

    `chain` starts with the leaf, goes on with the intermediates, and leaves out the root; `roots`
    are the trust anchors for peers. The times are aware and in UTC.
    """

    identity: SpiffeId
    private_key: bytes = field(repr=False)
    chain: tuple[bytes, ...] = field(repr=False)
    roots: tuple[bytes, ...] = field(repr=False)
    not_before: datetime
    not_after: datetime

    @classmethod
    def from_pem(
        cls,
        identity: SpiffeId,
        private_key: bytes,
        chain: Iterable[bytes],
        roots: Iterable[bytes],
    ) -> Certificate:
        """Take the times from the leaf; IdentityError unless the leaf is for `identity`."""
        links = tuple(chain)
        try:
            leaf = x509.load_pem_x509_certificate(links[0])
            named = spiffe_ids(leaf)
        except (IndexError, ValueError) as error:
            raise IdentityError(
                f"the authority's answer for {identity} holds no certificate ({error})",
                "check the authority's log",
            ) from None
        if named != (identity,):
            raise IdentityError(
                f"the authority answered with a certificate for {join_ids(named)}, not {identity}",
                "check that it may sign for this node's pods",
            )
        return cls(
            identity,
            private_key,
            links,
            tuple(roots),
            leaf.not_valid_before_utc,
            leaf.not_valid_after_utc,
        )

    @property
    def renew_at(self) -> datetime:
        """Half-life: late enough to be rare, early enough to survive an outage of the authority."""
        return self.not_before + (self.not_after - self.not_before) / 2

    def valid_at(self, moment: datetime) -> bool:
        return self.not_before <= moment < self.not_after


class Authority(Protocol):
    """Issues certificates; IdentityError if it cannot now."""

    async def sign(self, identity: SpiffeId) -> Certificate: ...


def spiffe_ids(certificate: x509.Certificate) -> tuple[SpiffeId, ...]:
    """The SPIFFE ids among the URI SANs, in the order of the certificate.

    URIs of any other shape are passed over, as ztunnel does; ValueError for a certificate whose
    extensions cannot be parsed.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    except x509.DuplicateExtension as error:
        raise ValueError(str(error)) from None
    found = []
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
        try:
            found.append(SpiffeId.parse(uri))
        except ValueError:
            continue
    return tuple(found)


def join_ids(ids: Iterable[SpiffeId]) -> str:
    """Ids for a message, sorted; never empty."""
    return ", ".join(sorted(map(str, ids))) or "no SPIFFE id"
