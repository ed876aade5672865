"""What the bed asks of bpf(2): which programs are attached, what is pinned, a run of a program."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

# Number of bpf(2) by machine; linux/bpf.h for the rest.
SYSCALL_NUMBER: Final = {"x86_64": 321, "aarch64": 280}[platform.machine()]
_PROG_TEST_RUN: Final = 10
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


def run_program(fd: int, *, data: bytes = b"", context: bytes = b"") -> tuple[int, bytes]:
    """What a loaded program returns for this packet or context, and the context afterwards.

    The packet has an Ethernet header (BPF_PROG_TEST_RUN; of sk_lookup since Linux 5.16).
    """
    packet, ctx = ctypes.create_string_buffer(data), ctypes.create_string_buffer(context)
    after = ctypes.create_string_buffer(len(context) or 1)
    sources = (ctypes.addressof(packet) if data else 0, 0)
    contexts = (ctypes.addressof(ctx), ctypes.addressof(after)) if context else (0, 0)
    # union bpf_attr's test: prog_fd, retval, the sizes of data in and out, data in and out,
    # repeat, duration, the sizes of the context in and out, the context in and out.
    sizes, context_sizes = (len(data), 0), (len(context), len(context))
    fields = (fd, 0, *sizes, *sources, 1, 0, *context_sizes, *contexts)
    attributes = ctypes.create_string_buffer(struct.pack("=IIIIQQIIIIQQ", *fields), 80)
    if _libc.syscall(SYSCALL_NUMBER, _PROG_TEST_RUN, attributes, 80):
        code = ctypes.get_errno()
        raise OSError(code, f"BPF_PROG_TEST_RUN: {os.strerror(code)}")
    (returned,) = struct.unpack_from("=i", attributes.raw, 4)
    return int(returned), after.raw[: len(context)]


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


@contextlib.contextmanager
def read_only() -> Iterator[None]:
    """Let nothing be pinned or unpinned for a while; what is pinned works on."""
    with writable_in_the_end():
        make_read_only()
        yield


@contextlib.contextmanager
def writable_in_the_end() -> Iterator[None]:
    try:
        yield
    finally:
        _remount("rw")


def make_read_only() -> None:
    _remount("ro")


def _remount(mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,bind,{mode}", str(_BPFFS)], check=True)
