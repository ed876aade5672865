"""Which BPF programs are attached (the one question of the bed to bpf(2)) and what is pinned."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

# Number of bpf(2) by machine; linux/bpf.h for the rest.
SYSCALL_NUMBER: Final = {"x86_64": 321, "aarch64": 280}[platform.machine()]
_PROG_QUERY: Final = 16

# enum bpf_attach_type: all of a cgroup (the unix socket ones came with Linux 6.7), all of a netns.
CGROUP_TYPES: Final = (
    *(0, 1, 2, 3),  # ingress, egress, sock_create, sock_ops
    *(6, 8, 9, 10, 11, 12, 13, 14, 15),  # device, bind, connect, post_bind, sendmsg
    *(18, 19, 20, 21, 22),  # sysctl, recvmsg, getsockopt, setsockopt
    *(29, 30, 31, 32, 34),  # getpeername, getsockname, sock_release
    *(49, 50, 51, 52, 53),  # unix connect, sendmsg, recvmsg, getpeername, getsockname
)
NETNS_TYPES: Final = (17, 36)  # flow_dissector, sk_lookup
# EINVAL: this kernel lacks the type. ENOSYS: it has no bpf(2) at all, so nothing is attached.
_NOTHING_THERE: Final = (errno.EINVAL, errno.ENOSYS)
_BPFFS: Final = Path("/sys/fs/bpf")
# What the kernel itself puts into every bpffs.
KERNELS_OWN: Final = frozenset(("maps.debug", "progs.debug"))
_libc = ctypes.CDLL(None, use_errno=True)


def attached(target: int, types: Iterable[int]) -> dict[int, int]:
    """{attach type: number of programs} on the cgroup or network namespace behind fd `target`."""
    counts = {kind: _count(target, kind) for kind in types}
    return {kind: count for kind, count in counts.items() if count}


def _count(target: int, kind: int) -> int:
    # union bpf_attr's query: target_fd, attach_type, query_flags, attach_flags, prog_ids,
    # prog_cnt. With no room for ids the kernel still says how many there are.
    attributes = ctypes.create_string_buffer(struct.pack("=IIIIQI", target, kind, 0, 0, 0, 0), 64)
    if _libc.syscall(SYSCALL_NUMBER, _PROG_QUERY, attributes, 64):
        code = ctypes.get_errno()
        if code in _NOTHING_THERE:
            return 0
        raise OSError(code, f"BPF_PROG_QUERY: {os.strerror(code)}")
    (count,) = struct.unpack_from("=I", attributes.raw, 24)
    return int(count)


def pins() -> list[str]:
    """The tree of the session's bpffs."""
    return sorted(str(path.relative_to(_BPFFS)) for path in _BPFFS.rglob("*"))


def remove_pins() -> None:
    """Empty the session's bpffs, so that what one test left behind does not fail the next."""
    for path in sorted(_BPFFS.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        elif path.name not in KERNELS_OWN:
            path.unlink()
