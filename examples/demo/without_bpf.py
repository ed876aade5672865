"""Run a command whose bpf(2) fails with ENOSYS, as on a kernel built without CONFIG_BPF_SYSCALL.

A seccomp filter (seccomp(2), SECCOMP_MODE_FILTER) does it and is inherited by every child:

    python -m examples.demo.without_bpf COMMAND [ARGUMENT...]
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_RETURN_ERRNO = 0x00050000
_RETURN_ALLOW = 0x7FFF0000

# Classic BPF, linux/filter.h: load a word of struct seccomp_data, jump if equal, return.
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE = 0, 4
# machine: (AUDIT_ARCH_*, number of bpf(2))
_MACHINES = {"x86_64": (0xC000003E, 321), "aarch64": (0xC00000B7, 280)}


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)


def _filter() -> bytes:
    architecture, number = _MACHINES[platform.machine()]
    return b"".join(
        (
            _instruction(_LOAD, _OFFSET_ARCHITECTURE),
            _instruction(_JUMP_IF_EQUAL, architecture, if_false=3),
            _instruction(_LOAD, _OFFSET_NUMBER),
            _instruction(_JUMP_IF_EQUAL, number, if_false=1),
            _instruction(_RETURN, _RETURN_ERRNO | errno.ENOSYS),
            _instruction(_RETURN, _RETURN_ALLOW),
        )
    )


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def forbid_bpf() -> None:
    """Make bpf(2) fail in this process and its children, for good; needs CAP_SYS_ADMIN."""
    code = _filter()
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        failed = ctypes.get_errno()
        raise OSError(failed, os.strerror(failed))


if __name__ == "__main__":
    forbid_bpf()
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 - becoming the command is the point
