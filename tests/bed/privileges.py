"""Becoming an ordinary user, with at most a few capabilities left."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from enum import IntEnum
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_KEEPCAPS: Final = 8
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_RAISE: Final = 2
_CAPABILITY_VERSION_3: Final = 0x20080522
_SIGKILL: Final = 9
_libc = ctypes.CDLL(None, use_errno=True)


class Capability(IntEnum):
    """The capabilities that tests give to apps (linux/capability.h)."""

    NET_BIND_SERVICE = 10
    NET_ADMIN = 12
    NET_RAW = 13
    SYS_ADMIN = 21


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def become(uid: int, gid: int, capabilities: Iterable[Capability] = ()) -> None:
    """Drop to `uid` and `gid` with just `capabilities` effective; uid 0 keeps them all.

    They are ambient as well, so that a program started from here has them too.
    """
    wanted = tuple(capabilities)
    _check(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if uid:
        _set_capabilities(sum(1 << capability for capability in wanted))
        for capability in wanted:
            _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, int(capability), 0, 0))


def _set_capabilities(mask: int) -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    # Two structs of effective, permitted, inheritable: bits 0-31, then bits 32-63.
    data = (ctypes.c_uint32 * 6)(low, low, low, high, high, high)
    _check(_libc.capset(header, data))


def die_with_parent() -> None:
    """End when the parent does; a change of user clears this, so it comes last."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0))
