"""Which guards a pod gets, as its operator chose."""

from __future__ import annotations

from pyambient.errors import UsageError

from .egress_guard import EgressGuard, GuardedPod
from .interface import PodNetwork, Step
from .node_guard import NodeGuard
from .options import CaptureOptions


def guards(
    bpffs: str, cookie: int, network: PodNetwork, options: CaptureOptions
) -> tuple[Step, ...]:
    """The last steps of a plan: on each device, and behind each one on the node if wanted."""
    if options.guard == "off":
        return ()
    counts_only = options.guard == "count"
    inside = [
        EgressGuard(bpffs, device, cookie, counts_only, options.guard_node)
        for device in network.devices
    ]
    outside = [NodeGuard(bpffs, device, cookie, counts_only) for device in network.devices]
    return (GuardedPod(bpffs, cookie), *inside, *(outside if options.guard_node else ()))


def refuse_guard_node(backend: str, options: CaptureOptions) -> None:
    """For backends whose pods have no guard of their own."""
    if options.guard_node:
        raise UsageError(
            f"backend {backend} has no guard whose sign the node's would know",
            "leave out --guard-node, or use --backend bpf",
        )
