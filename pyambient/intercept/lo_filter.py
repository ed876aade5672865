"""A BPF program at tc ingress of a namespace's lo (clsact; tc-bpf(8)).

tcx links (Linux 6.6) would go away with their pin, but where they exist nobody needs this filter.
A filter without a link stays until it is deleted, so ours has a fixed place: applied again it
replaces itself, and un-enrolment finds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
from collections.abc import Iterator
from ctypes import c_int, c_size_t, c_uint32
from typing import Final

from pyambient.netns import Netns

from . import libbpf
from .rtnetlink import routing

_LOOPBACK_IFINDEX: Final = 1
_INGRESS, _EGRESS = 1, 2
_BOTH_DIRECTIONS: Final = 3
_REPLACE: Final = 1
# First in the row: a filter before it could decide, and end the row.
_PRIORITY: Final = 1
_HANDLE: Final = 0x111
_NOT_THERE: Final = (errno.ENOENT, errno.EINVAL, errno.ENODEV)


class _Hook(ctypes.Structure):
    """struct bpf_tc_hook."""

    _fields_ = (
        ("sz", c_size_t),
        ("ifindex", c_int),
        ("attach_point", c_int),
        ("parent", c_uint32),
    )


class _Options(ctypes.Structure):
    """struct bpf_tc_opts."""

    _fields_ = (
        ("sz", c_size_t),
        ("prog_fd", c_int),
        ("flags", c_uint32),
        ("prog_id", c_uint32),
        ("handle", c_uint32),
        ("priority", c_uint32),
    )


def _hook(attach_point: int = _INGRESS, device: int = _LOOPBACK_IFINDEX) -> _Hook:
    return _Hook(ctypes.sizeof(_Hook), device, attach_point, 0)


def _options(program: int = 0, flags: int = 0, priority: int = _PRIORITY) -> _Options:
    return _Options(ctypes.sizeof(_Options), program, flags, 0, _HANDLE, priority)


def _call(netns: Netns, function: str, *arguments: ctypes.Structure) -> None:
    with netns.entered():
        libbpf.call(function, *(ctypes.byref(argument) for argument in arguments))


@contextlib.contextmanager
def _absence_is_fine() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise


def has_qdisc(netns: Netns) -> bool:
    """Whether lo has a place for filters at its ingress, ours or somebody else's."""
    with routing(netns) as kernel:
        qdiscs = kernel.get_qdiscs(index=_LOOPBACK_IFINDEX)
        return any(q.get_attr("TCA_KIND") in ("clsact", "ingress") for q in qdiscs)


def attach(netns: Netns, program: int) -> None:
    """Have packets that come in by lo pass the program fd, in the place of an earlier one."""
    with contextlib.suppress(FileExistsError):
        _call(netns, "bpf_tc_hook_create", _hook())
    _call(netns, "bpf_tc_attach", _hook(), _options(program, _REPLACE))


def attached(netns: Netns) -> int | None:
    """The id of the program in our place, or None."""
    return program_at(netns, _LOOPBACK_IFINDEX, _PRIORITY)


def program_at(netns: Netns, device: int, priority: int, *, egress: bool = False) -> int | None:
    """The id of the program with our handle in such a place of a device, or None."""
    found = _options(priority=priority)
    with _absence_is_fine():
        _call(netns, "bpf_tc_query", _hook(_EGRESS if egress else _INGRESS, device), found)
    return found.prog_id or None


def detach(netns: Netns) -> None:
    """Take our filter away; that there is none is no error."""
    with _absence_is_fine():
        _call(netns, "bpf_tc_detach", _hook(), _options())


def remove_qdisc(netns: Netns) -> None:
    """Take the place for filters away, and all that is in it."""
    with _absence_is_fine():
        _call(netns, "bpf_tc_hook_destroy", _hook(_BOTH_DIRECTIONS))
