"""Which backend a pod gets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from pyambient.errors import PyambientError, UsageError
from pyambient.model.backends import BACKENDS
from pyambient.netns import Netns

from . import probe, scratch
from .bpf import Bpf
from .interface import Interceptor, Site
from .iptables import Iptables
from .nftables import Nftables
from .options import DEFAULTS, CaptureOptions
from .preflight import check_cgroup
from .tc import Tc


def choose(
    name: str,
    site: Site,
    netns: Netns | None = None,
    options: CaptureOptions = DEFAULTS,
) -> Interceptor:
    """The backend called `name`; "auto" takes the first of them that works on this node.

    For the pod of `netns` it takes `bpf` only if its hooks see all processes there, and all that
    `options` want captured, and `tc` only with all that they want guarded. PyambientError if the
    backend that was asked for does not work. `iptables` is the last resort, and not tried.
    """
    if name not in ("auto", *BACKENDS):
        raise UsageError(
            f"there is no backend {name!r}", f"choose one of auto, {', '.join(BACKENDS)}"
        )
    if name in _TRIED:
        return _TRIED[name](site)
    if name == "auto":
        for backend, make in _TRIED.items():
            if not _suits(backend, site, options):
                continue
            with contextlib.suppress(PyambientError):
                if netns is not None and backend == "bpf":
                    check_cgroup(netns, site)
                return make(site)
    return Iptables()


def _suits(backend: str, site: Site, options: CaptureOptions) -> bool:
    """Whether a backend that works here does what is wanted."""
    if backend == "bpf":
        return not options.devices
    return backend != "tc" or options.guard == "off" or probe.has_fence(site.cgroup)


def _bpf(site: Site) -> Interceptor:
    _require("bpf", site)
    return Bpf(site, probe.constants(site.cgroup))


def _tc(site: Site) -> Interceptor:
    _require("tc", site)
    return Tc(site, probe.constants(site.cgroup))


def _require(backend: str, site: Site) -> None:
    lack = probe.lacking(site.cgroup, backend)
    if lack is not None:
        raise lack.refusal()


def _nftables(_: Site) -> Interceptor:
    refusal = scratch.nftables_refusal()
    if refusal is not None:
        raise refusal.with_traceback(None)
    return Nftables()


_TRIED: Final[dict[str, Callable[[Site], Interceptor]]] = {
    "bpf": _bpf,
    "tc": _tc,
    "nftables": _nftables,
}
