"""The pytest process in mount and network namespaces of its own.

The whole session moves, once, at configure time: what a test adds to "the node" (links, rules,
named network namespaces, BPF pins) then lives in namespaces that vanish with the process, however
it ends. Unit tests run there too and never notice.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

_CLONE_NEWNS = 0x00020000
_CLONE_NEWNET = 0x40000000
_MS_REC = 0x4000
_MS_PRIVATE = 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)
_state = {"reason": "the session never tried to enter namespaces of its own"}


def _check(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(source: str, target: str, kind: str, flags: int = 0) -> None:
    """Mount without options, or change the flags of a mount; OSError names the target."""
    arguments = (source.encode(), target.encode(), kind.encode(), flags, None)
    _check(_libc.mount(*arguments), f"mount {kind or 'flags'} on {target}")


def setns(fd: int, kind: int) -> None:
    """Move the calling thread, or raise OSError."""
    _check(_libc.setns(fd, kind), "setns")


def enter() -> None:
    """Move this process; what goes wrong is kept for `require`, unit tests go on without."""
    if os.geteuid() != 0:
        _state["reason"] = "network tests need root: run pytest with sudo"
        return
    try:
        _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET), "unshare")
        mount("none", "/", "", _MS_REC | _MS_PRIVATE)
        _mount_own_state()
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        _state["reason"] = f"network tests need mount and network namespaces of their own: {error}"
    else:
        _state["reason"] = ""


def _mount_own_state() -> None:
    """Named network namespaces and BPF pins of this session only; the rest of /run stays."""
    Path("/run/netns").mkdir(exist_ok=True)
    mount("pyambient-tests", "/run/netns", "tmpfs")
    if not Path("/sys/fs/bpf").is_dir():
        return  # a kernel without BPF has no such directory, and needs none
    mount("pyambient-tests", "/sys/fs/bpf", "bpf")


def require() -> None:
    """Fail the calling test, with what to do, where `enter` could not isolate the session."""
    if _state["reason"]:
        pytest.fail(_state["reason"], pytrace=False)
