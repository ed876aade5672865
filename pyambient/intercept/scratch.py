"""A backend tried on a network namespace that nobody lives in."""

from __future__ import annotations

import functools
import socket

from pyambient.errors import PyambientError, UnsupportedFeature
from pyambient.netns import Netns

from .interface import Interceptor, Pod, PodNetwork
from .nftables import Nftables
from .rtnetlink import request
from .runner import StepFailed, apply_stages, undo_stages

_LO_INDEX = 1  # in every namespace


def try_out(interceptor: Interceptor, *, ipv6: bool) -> None:
    """Enrol an empty network namespace that has this family, and free it; raises what fails.

    It has IPv4 in any case.
    """
    with Netns.empty() as netns:
        request(netns, lambda kernel: kernel.link("set", index=_LO_INDEX, state="up"), ())
        pod = Pod("scratch", netns)
        plan = interceptor.plan(pod, PodNetwork((), (), has_ipv6=ipv6))
        undo_stages(pod, apply_stages(pod, plan.steps))


@functools.cache
def nftables_refusal() -> PyambientError | None:
    """Why backend `nftables` does not work here, tried once per process; None if it does."""
    try:
        try_out(Nftables(), ipv6=_has_ipv6())
    except StepFailed as error:
        error.exit_code = UnsupportedFeature.exit_code
        return error
    except PyambientError as error:
        return error
    except OSError as error:
        return PyambientError(f"no network namespace to try nftables in: {error.strerror}")
    return None


def _has_ipv6() -> bool:
    """Whether this kernel has IPv6 at all."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return False
    return True
