"""What this kernel can do, found out by doing it.

Distributions backport, so no version number is asked. Each feature is one attempt: the real
programs are loaded, and linked to a network namespace and a cgroup made for the moment. Nobody
lives in either, so nothing that runs on the node notices.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyambient.errors import PyambientError, UnsupportedFeature
from pyambient.netns import Netns

from . import libbpf, lo_filter
from .device_program import DevicePlace, Direction, add_filter
from .fence import Fence
from .interface import Pod
from .kernel_objects import AttachType, Link
from .loader import BpfObject, Constants, ProgramRefused, load_compiled
from .netns_cookie import ask_by_connect, netns_cookie
from .node_hooks import HOOKS, PROXY_HOOKS, Hook, Place
from .scratch_cgroup import scratch_cgroup

_BPF_MAP_TYPE_HASH: Final = 1
_ANOTHER_BACKEND: Final = "--backend nftables or iptables"


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that the backends `bpf` and `tc` use, or one of them.

    `minimum_kernel` is the first release that has it ("" for what is no matter of the kernel),
    `instead` what is done without it, `error` why it is not present. Without a `needed` feature
    the backend cannot work.
    """

    name: str
    minimum_kernel: str
    needed: bool
    instead: str
    present: bool
    error: str = ""

    def refusal(self) -> PyambientError:
        """The error for somebody who asked for the backend all the same."""
        if not self.minimum_kernel:
            return PyambientError(self.error)
        return UnsupportedFeature(self.name, self.minimum_kernel, f"use {self.instead}")


@dataclass(frozen=True, slots=True)
class _Attempt:
    name: str
    minimum_kernel: str
    run: Callable[[Path | None], None]
    needed: bool = True
    instead: str = _ANOTHER_BACKEND
    alternative: Callable[[Path | None], None] | None = None

    def feature(self, cgroup: Path | None) -> Feature:
        """Try it, and where it fails the alternative, if there is one."""
        reason = _failure(self.run, cgroup)
        needed, instead = self.needed, self.instead
        if reason and self.alternative is not None:
            failure = _failure(self.alternative, cgroup)
            needed = bool(failure)
            if failure:
                reason, instead = f"{reason}; {instead}: {failure}", _ANOTHER_BACKEND
        return Feature(self.name, self.minimum_kernel, needed, instead, not reason, reason)


def _failure(run: Callable[[Path | None], None], cgroup: Path | None) -> str:
    """Why it does not work; empty if it does."""
    try:
        run(cgroup)
    except OSError as error:
        return error.strerror or str(error)
    except ProgramRefused as error:
        return error.what
    except PyambientError as error:
        return str(error)
    return ""


@functools.cache
def probe(cgroup: Path | None, backend: str) -> tuple[Feature, ...]:
    """Every feature of the backend `bpf` or `tc`, tried once per process below `cgroup`."""
    return tuple(attempt.feature(cgroup) for attempt in _ATTEMPTS[backend])


def lacking(cgroup: Path | None, backend: str = "bpf") -> Feature | None:
    """The first needed feature that is not there; None if the backend works here."""
    return next((f for f in probe(cgroup, backend) if f.needed and not f.present), None)


def has_fence(cgroup: Path | None) -> bool:
    """Whether what leaves by a new device can be held back."""
    return any(f.name == _FENCE and f.present for f in probe(cgroup, "tc"))


def constants(cgroup: Path | None) -> Constants:
    """What the programs are told of this kernel."""
    present = {feature.name for feature in probe(cgroup, "bpf") if feature.present}
    return Constants(
        node=node_cookie(cgroup),
        has_ingress_ifindex=_INGRESS_IFINDEX in present,
        has_set_retval=_SET_RETVAL in present,
    )


def _load(name: str, told: Constants | None = None) -> BpfObject:
    """What the kernel can do is no matter of the loader: the quick one finds it out."""
    return load_compiled(name, told or Constants(), {})


@functools.cache
def node_cookie(cgroup: Path | None) -> int:
    """The cookie of the network namespace that this process is in, which is the node's."""
    with Netns.own() as own:
        return netns_cookie(own, cgroup)


def _installation(_: Path | None) -> None:
    for name in (
        "lookup",
        "note",
        "guard",
        "guard_node",
        "redirect",
        "cookie",
        *(hook.source for hook in HOOKS),
    ):
        BpfObject(name).close()


def _system_call(_: Path | None) -> None:
    os.close(libbpf.call("bpf_map_create", _BPF_MAP_TYPE_HASH, None, 4, 4, 1, None))


def _cgroup2(cgroup: Path | None) -> None:
    with scratch_cgroup(cgroup):
        pass


def _cookie(_: Path | None) -> None:
    with Netns.own() as own:
        own.cookie()


def _magic_connect(cgroup: Path | None) -> None:
    with Netns.own() as own:
        ask_by_connect(own, cgroup)


def _link_hooks(cgroup: Path | None, hooks: Iterable[Hook]) -> None:
    with scratch_cgroup(cgroup) as scratch, contextlib.ExitStack() as stack:
        objects: dict[str, BpfObject] = {}
        for hook in hooks:
            if hook.source not in objects:
                objects[hook.source] = stack.enter_context(_load(hook.source))
            program = objects[hook.source].program_fd(hook.program)
            scratch.link(program, hook.attach_type).close()


def _app_hooks(cgroup: Path | None) -> None:
    _link_hooks(cgroup, (h for h in HOOKS if h.source in ("bind", "connect", "probe")))


def _dns_hooks(cgroup: Path | None) -> None:
    _link_hooks(cgroup, (hook for hook in HOOKS if hook.source == "dns"))


def _proxy_hooks(cgroup: Path | None) -> None:
    _link_hooks(cgroup, (hook for hook in HOOKS if hook.place is Place.PROXY))


def _proxy_connects(cgroup: Path | None) -> None:
    _link_hooks(cgroup, (hook for hook in PROXY_HOOKS if hook.source in ("connect", "probe")))


def _tcx(_: Path | None) -> None:
    with Netns.empty() as scratch, _load("redirect") as loaded, scratch.entered():
        program = loaded.program_fd(_REDIRECT.program)
        Link.create(program, _LO_INDEX, _REDIRECT.direction.tcx, first=True).close()


def _clsact(_: Path | None) -> None:
    with Netns.empty() as scratch, _load("redirect") as loaded:
        add_filter(scratch, _LO_INDEX, _REDIRECT, loaded.program_fd(_REDIRECT.program))


def _fence(_: Path | None) -> None:
    with Netns.empty() as scratch:
        Fence("", 0, ()).apply(Pod("scratch", scratch))


def _sk_lookup(_: Path | None) -> None:
    with Netns.empty() as scratch, _load("lookup") as loaded:
        program = loaded.program_fd("pyamb_sk_lookup")
        Link.create(program, scratch.fd, AttachType.SK_LOOKUP).close()


def _ingress_ifindex(_: Path | None) -> None:
    _load("lookup", Constants(has_ingress_ifindex=True)).close()


def _note_on_lo(_: Path | None) -> None:
    with Netns.empty() as scratch, _load("note") as loaded:
        lo_filter.attach(scratch, loaded.program_fd("pyamb_note"))


def _set_retval(_: Path | None) -> None:
    _load("connect", Constants(has_set_retval=True)).close()


_INGRESS_IFINDEX: Final = "ingress_ifindex in sk_lookup"
_SET_RETVAL: Final = "bpf_set_retval"
_REDIRECT: Final = DevicePlace("pyamb_redirect", Direction.EGRESS, rank=1)
_LO_INDEX: Final = 1
_FENCE: Final = "nf_tables, family inet"
_BASICS: Final = (
    _Attempt("libbpf and compiled programs", "", _installation),
    _Attempt("bpf(2)", "4.4", _system_call),
    _Attempt("cgroup2", "", _cgroup2),
)
_SHARED: Final = (
    _Attempt("socket storage in sock_create and sockops", "5.9", _proxy_hooks),
    _Attempt("sk_lookup", "5.9", _sk_lookup),
    _Attempt(
        "SO_NETNS_COOKIE",
        "5.14",
        _cookie,
        instead="a connect that a BPF program answers",
        alternative=_magic_connect,
    ),
    _Attempt(
        _INGRESS_IFINDEX,
        "5.17",
        _ingress_ifindex,
        instead="a tc filter on the pod's lo",
        alternative=_note_on_lo,
    ),
)
_ATTEMPTS: Final = {
    "bpf": (
        *_BASICS,
        _Attempt("cgroup links for connect and bind", "5.9", _app_hooks),
        _Attempt("cgroup links for DNS: sendmsg, recvmsg, getpeername", "5.8", _dns_hooks),
        *_SHARED,
        _Attempt(_SET_RETVAL, "5.18", _set_retval, needed=False, instead="EPERM for ECONNREFUSED"),
    ),
    "tc": (
        *_BASICS,
        _Attempt("cgroup links for the connects of proxy and probes", "5.9", _proxy_connects),
        *_SHARED,
        _Attempt(
            "tcx links", "6.6", _tcx, instead="filters of a clsact qdisc", alternative=_clsact
        ),
        _Attempt(
            _FENCE,
            "3.14",
            _fence,
            needed=False,
            instead="--guard off: nothing holds back what leaves by a new device",
        ),
    ),
}
