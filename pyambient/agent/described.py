"""What the proxy is told of a pod beside its name: a function of the pod's record."""

from __future__ import annotations

from pyambient.intercept.bpf_steps import OwnAddress
from pyambient.zds.details import DnsCapture, PodDetails

from .records import Record


def details_of(record: Record) -> PodDetails:
    """How the recorded pod is intercepted."""
    return PodDetails(
        record.backend, record.addresses, dns=_dns_capture(record), ports=record.ports
    )


def _dns_capture(record: Record) -> DnsCapture | None:
    """That its DNS is captured, whether or not it is by now; None if it will not be.

    The resolvers' map is where all maps of the pod are. The step that says where is there for as
    long as the proxy may have to answer, while the gates are gone when a pod drains.
    """
    if not record.options.dns:
        return None
    for step in record.steps:
        if isinstance(step, OwnAddress):
            return DnsCapture(step.bpffs, step.cookie)
    return None if record.backend == "bpf" else DnsCapture()
