"""SPIFFE ids in Istio's one shape: `spiffe://<domain>/ns/<namespace>/sa/<service account>`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SEGMENT = r"[A-Za-z0-9._-]+"
_SHAPE = re.compile(rf"spiffe://([a-z0-9._-]+)/ns/({_SEGMENT})/sa/({_SEGMENT})")


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """The identity of a workload; equal ids are one identity."""

    trust_domain: str
    namespace: str
    service_account: str

    @classmethod
    def parse(cls, uri: str) -> SpiffeId:
        """Parse a URI; ValueError for any other shape, as ztunnel ignores such SANs."""
        match = _SHAPE.fullmatch(uri)
        if match is None:
            raise ValueError(f"{uri!r} is not spiffe://<trust domain>/ns/<namespace>/sa/<account>")
        return cls(*match.groups())

    @property
    def principal(self) -> str:
        """The form of authorization policies: the id without its scheme."""
        return f"{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    def __str__(self) -> str:
        return f"spiffe://{self.principal}"
