"""What this kernel can do, found out by doing it.

Distributions backport, so no version number is asked. Each feature is one attempt: the real
programs are loaded, and linked to a network namespace and a cgroup made for the moment. Nobody
lives in either, so nothing that runs on the node notices.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyambient.errors import PyambientError, UnsupportedFeature
from pyambient.netns import CLONE_NEWNET, Netns

from . import libbpf
from .bpf_node import HOOKS
from .kernel_objects import AttachType, Link
from .loader import BpfObject, Constants, load

_BPF_MAP_TYPE_HASH: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that the backend `bpf` uses.

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
    instead: str = "--backend iptables"

    def feature(self, cgroup: Path | None) -> Feature:
        try:
            self.run(cgroup)
        except OSError as error:
            reason = error.strerror or str(error)
        except PyambientError as error:
            reason = str(error)
        else:
            reason = ""
        return Feature(
            self.name, self.minimum_kernel, self.needed, self.instead, not reason, reason
        )


@functools.cache
def probe(cgroup: Path | None) -> tuple[Feature, ...]:
    """Every feature of the backend `bpf`, tried once per process below `cgroup`."""
    return tuple(attempt.feature(cgroup) for attempt in _ATTEMPTS)


def lacking(cgroup: Path | None) -> Feature | None:
    """The first needed feature that is not there; None if the backend `bpf` works here."""
    return next((f for f in probe(cgroup) if f.needed and not f.present), None)


def has_set_retval(cgroup: Path | None) -> bool:
    """Whether a refused connect can say ECONNREFUSED."""
    return any(f.present for f in probe(cgroup) if f.name == _SET_RETVAL)


@contextlib.contextmanager
def _scratch_cgroup(parent: Path | None) -> Iterator[Path]:
    if parent is None:
        raise PyambientError("cgroup2 is not mounted", "run 'mount -t cgroup2 none DIR'")
    scratch = parent / f"pyambient-probe-{os.getpid()}"
    scratch.mkdir(exist_ok=True)
    try:
        yield scratch
    finally:
        scratch.rmdir()


@contextlib.contextmanager
def _scratch_netns() -> Iterator[Netns]:
    # Entering the own namespace is what brings this thread back from the one it makes.
    with Netns.own() as own, own.entered():
        if _libc.unshare(CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), "unshare")
        scratch = Netns.own()
    with scratch:
        yield scratch


def _installation(_: Path | None) -> None:
    for name in ("lookup", *(hook.source for hook in HOOKS)):
        BpfObject(name).close()


def _system_call(_: Path | None) -> None:
    os.close(libbpf.call("bpf_map_create", _BPF_MAP_TYPE_HASH, None, 4, 4, 1, None))


def _cgroup2(cgroup: Path | None) -> None:
    with _scratch_cgroup(cgroup):
        pass


def _cookie(_: Path | None) -> None:
    with Netns.own() as own:
        own.cookie()


def _hooks(cgroup: Path | None, sources: frozenset[str]) -> None:
    with _scratch_cgroup(cgroup) as scratch, contextlib.ExitStack() as stack:
        target = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, target)
        for source in sources:
            loaded = stack.enter_context(load(source))
            for hook in HOOKS:
                if hook.source == source:
                    program = loaded.program_fd(hook.program)
                    Link.create(program, target, hook.attach_type).close()


def _app_hooks(cgroup: Path | None) -> None:
    _hooks(cgroup, frozenset(hook.source for hook in HOOKS if not hook.on_proxy))


def _proxy_hooks(cgroup: Path | None) -> None:
    _hooks(cgroup, frozenset(hook.source for hook in HOOKS if hook.on_proxy))


def _sk_lookup(_: Path | None) -> None:
    with _scratch_netns() as scratch, load("lookup") as loaded:
        program = loaded.program_fd("pyamb_sk_lookup")
        Link.create(program, scratch.fd, AttachType.SK_LOOKUP).close()


def _ingress_ifindex(_: Path | None) -> None:
    load("lookup", Constants(has_ingress_ifindex=True)).close()


def _set_retval(_: Path | None) -> None:
    load("connect", Constants(has_set_retval=True)).close()


_SET_RETVAL: Final = "bpf_set_retval"
_ATTEMPTS: Final = (
    _Attempt("libbpf and compiled programs", "", _installation),
    _Attempt("bpf(2)", "4.4", _system_call),
    _Attempt("cgroup2", "4.5", _cgroup2),
    _Attempt("cgroup links for connect and bind", "5.9", _app_hooks),
    _Attempt("sk_lookup", "5.9", _sk_lookup),
    _Attempt("SO_NETNS_COOKIE", "5.14", _cookie),
    _Attempt("socket storage and netns cookie in sockops", "5.15", _proxy_hooks),
    _Attempt("ingress_ifindex in sk_lookup", "5.17", _ingress_ifindex),
    _Attempt(_SET_RETVAL, "5.18", _set_retval, needed=False, instead="EPERM for ECONNREFUSED"),
)
