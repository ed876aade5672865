"""What the proxy is told of a pod, from the pod's record."""

from __future__ import annotations

import pytest

from pyambient.agent.described import details_of
from pyambient.agent.records import NetnsRef, Record, State
from pyambient.intercept.bpf_steps import DnsGate, Gate, OwnAddress
from pyambient.intercept.interface import Step
from pyambient.intercept.options import DEFAULTS, CaptureOptions
from pyambient.intercept.sysctl import ReservedPorts
from pyambient.model.workload import PodRef
from pyambient.zds.details import DnsCapture, PodDetails

_BPFFS = "/sys/fs/bpf/pyambient"
_FOUNDATION = (ReservedPorts(), OwnAddress(_BPFFS, 17, "10.0.0.2"))
_WITHOUT_DNS = CaptureOptions(dns=False)
_GATES = (DnsGate(_BPFFS, 17), Gate(_BPFFS, 17))


def record(backend: str, steps: tuple[Step, ...], options: CaptureOptions) -> Record:
    return Record(
        PodRef("u1", "shop", "default", "shop"),
        NetnsRef("/run/netns/shop", 4, 4026532001, 17),
        backend,
        State.ENROLLED,
        steps,
        ("10.0.0.2",),
        options=options,
    )


@pytest.mark.parametrize(
    ("backend", "steps", "options", "capture"),
    [
        ("bpf", (*_FOUNDATION, *_GATES), DEFAULTS, DnsCapture(_BPFFS, 17)),
        ("bpf", _FOUNDATION, DEFAULTS, DnsCapture(_BPFFS, 17)),
        ("bpf", (), DEFAULTS, None),
        ("bpf", (*_FOUNDATION, *_GATES), _WITHOUT_DNS, None),
        ("tc", (*_FOUNDATION, *_GATES), DEFAULTS, DnsCapture(_BPFFS, 17)),
        ("nftables", (ReservedPorts(),), DEFAULTS, DnsCapture()),
        ("iptables", (ReservedPorts(),), _WITHOUT_DNS, None),
    ],
    ids=["bpf", "draining", "freed", "off", "tc", "netfilter", "netfilter off"],
)
def test_dns_is_told_with_where_its_resolvers_are_noted(
    backend: str, steps: tuple[Step, ...], options: CaptureOptions, capture: DnsCapture | None
) -> None:
    """While the pod drains, too: the proxy may have started in between."""
    assert details_of(record(backend, steps, options)) == PodDetails(
        backend, ("10.0.0.2",), dns=capture
    )
