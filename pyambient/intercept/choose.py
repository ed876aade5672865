"""Which backend a pod gets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from pyambient.errors import PyambientError, UsageError

from . import probe, scratch
from .bpf import Bpf
from .interface import Interceptor, Site
from .iptables import Iptables
from .nftables import Nftables


def choose(name: str, site: Site) -> Interceptor:
    """The backend called `name`; "auto" takes the first of them that works on this node.

    PyambientError if the one that was asked for does not. `iptables` is the last resort, and not
    tried.
    """
    if name not in BACKENDS:
        raise UsageError(f"there is no backend {name!r}", f"choose one of {', '.join(BACKENDS)}")
    if name in _TRIED:
        return _TRIED[name](site)
    if name == "auto":
        for make in _TRIED.values():
            with contextlib.suppress(PyambientError):
                return make(site)
    return Iptables()


def _bpf(site: Site) -> Interceptor:
    lack = probe.lacking(site.cgroup)
    if lack is not None:
        raise lack.refusal()
    return Bpf(site, probe.constants(site.cgroup))


def _nftables(_: Site) -> Interceptor:
    refusal = scratch.nftables_refusal()
    if refusal is not None:
        raise refusal.with_traceback(None)
    return Nftables()


# In the order of preference.
_TRIED: Final[dict[str, Callable[[Site], Interceptor]]] = {"bpf": _bpf, "nftables": _nftables}
BACKENDS: Final = ("auto", *_TRIED, "iptables")
