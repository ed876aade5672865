"""What each backend needs of a node: hooks of its cgroups, and maps that all pods share."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from .kernel_objects import AttachType
from .original_dns import RESOLVERS_MAP

# Whatever decides about a pod tells it by these (bpf/trace.h).
TRACE_MAPS: Final = ("trace_readers", "trace_rings")
MAPS: Final = (
    *("pods", "addresses", "devices", "listeners", "workers"),
    *("proxy_sockets", "captured_socks", "upstreams", "selections"),
    *("dns_pods", RESOLVERS_MAP),
    *("probe_sockets", "probes", "moved_ports"),
    *("entered", "notes", "existing", "let_in", "drops"),
    *("lookup_program", "guard_program"),
    *TRACE_MAPS,
)
REDIRECT_MAPS: Final = ("forwarded", "forwarded_dns", "split_dns")
ALL_MAPS: Final = MAPS + REDIRECT_MAPS
PROGRAM_PREFIX: Final = "pyamb_"


class Place(enum.Enum):
    """A cgroup that hooks are on: that of all apps, the proxy's, that of what probes pods."""

    APPS = enum.auto()
    PROXY = enum.auto()
    PROBES = enum.auto()


@dataclass(frozen=True, slots=True)
class Hook:
    """A program of the node, and the cgroup it belongs on."""

    source: str
    program: str
    attach_type: AttachType
    place: Place = Place.APPS

    @property
    def name(self) -> str:
        return self.program.removeprefix(PROGRAM_PREFIX)

    @property
    def pin(self) -> str:
        return f"proxy_{self.name}" if self.place is Place.PROXY else self.name


_PROXY_SOCKETS: Final = (
    Hook("proxy_socket", "pyamb_sock", AttachType.SOCK_CREATE, Place.PROXY),
    Hook("proxy_socket", "pyamb_sockops", AttachType.SOCK_OPS, Place.PROXY),
)
_PROBES: Final = (
    Hook("probe", "pyamb_probe4", AttachType.CONNECT4, Place.PROBES),
    Hook("probe", "pyamb_probe6", AttachType.CONNECT6, Place.PROBES),
    Hook("probe", "pyamb_probing", AttachType.SOCK_OPS, Place.PROBES),
)
# The proxy must be known before connects are judged.
HOOKS: Final = (
    *_PROXY_SOCKETS,
    Hook("bind", "pyamb_bind4", AttachType.BIND4),
    Hook("bind", "pyamb_bind6", AttachType.BIND6),
    Hook("connect", "pyamb_connect4", AttachType.CONNECT4),
    Hook("connect", "pyamb_connect6", AttachType.CONNECT6),
    Hook("dns", "pyamb_dns_conn4", AttachType.CONNECT4),
    Hook("dns", "pyamb_dns_conn6", AttachType.CONNECT6),
    Hook("dns", "pyamb_dns_send4", AttachType.UDP4_SENDMSG),
    Hook("dns", "pyamb_dns_send6", AttachType.UDP6_SENDMSG),
    Hook("dns", "pyamb_dns_recv4", AttachType.UDP4_RECVMSG),
    Hook("dns", "pyamb_dns_recv6", AttachType.UDP6_RECVMSG),
    Hook("dns", "pyamb_dns_peer4", AttachType.GETPEERNAME4),
    Hook("dns", "pyamb_dns_peer6", AttachType.GETPEERNAME6),
    *_PROBES,
)
# Where no hook sees the apps: the proxy's own connects alone.
PROXY_HOOKS: Final = (
    *_PROXY_SOCKETS,
    Hook("connect", "pyamb_connect4", AttachType.CONNECT4, Place.PROXY),
    Hook("connect", "pyamb_connect6", AttachType.CONNECT6, Place.PROXY),
    *_PROBES,
)
ALL_HOOKS: Final = tuple(dict.fromkeys((*HOOKS, *PROXY_HOOKS)))


@dataclass(frozen=True, slots=True)
class SharedProgram:
    """A program that no hook runs but the pods' entries go on to, by way of a map (`entry`)."""

    source: str
    program: str
    map: str


LOOKUP: Final = SharedProgram("lookup", "pyamb_sk_lookup", "lookup_program")
GUARD: Final = SharedProgram("guard", "pyamb_guard", "guard_program")
SHARED: Final = (LOOKUP, GUARD)


@dataclass(frozen=True, slots=True)
class ProgramSet:
    """What one backend needs of the node, beside the shared programs.

    `sources` are programs that each pod loads for itself, and whose maps all pods share.
    """

    hooks: tuple[Hook, ...]
    maps: tuple[str, ...]
    sources: tuple[str, ...] = ()


BPF: Final = ProgramSet(HOOKS, MAPS)
_NOT_OF_TC: Final = frozenset((RESOLVERS_MAP,))
TC: Final = ProgramSet(
    PROXY_HOOKS, tuple(name for name in ALL_MAPS if name not in _NOT_OF_TC), ("redirect",)
)
