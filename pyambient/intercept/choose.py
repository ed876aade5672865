"""Which backend a pod gets."""

from __future__ import annotations

from pyambient.errors import UsageError

from . import probe
from .bpf import Bpf
from .interface import Interceptor, Site
from .iptables import Iptables

BACKENDS = ("auto", "bpf", "iptables")


def choose(name: str, site: Site) -> Interceptor:
    """The backend called `name`; "auto" takes `bpf` where this node has all it needs.

    UnsupportedFeature if `bpf` was asked for and this kernel lacks something.
    """
    if name not in BACKENDS:
        raise UsageError(f"there is no backend {name!r}", f"choose one of {', '.join(BACKENDS)}")
    if name == "iptables":
        return Iptables()
    lack = probe.lacking(site.cgroup)
    if lack is None:
        return Bpf(site, has_set_retval=probe.has_set_retval(site.cgroup))
    if name == "bpf":
        raise lack.refusal()
    return Iptables()
