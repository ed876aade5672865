"""A kernel without bpf(2), for one process and its children: a seccomp filter answers ENOSYS.

That is what a kernel built without CONFIG_BPF_SYSCALL answers. `python seccomp.py COMMAND ...`
runs a command so; `forbid_bpf` does it to the calling process, for good.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from typing import Final

# Audit architecture (linux/audit.h) and number of bpf(2). This file runs as a program of its own,
# so it imports nothing of the bed.
_ARCHITECTURES: Final = {"x86_64": (0xC000003E, 321), "aarch64": (0xC00000B7, 280)}
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_RET_ALLOW, _RET_ERRNO = 0x7FFF0000, 0x00050000
# Classic BPF: load a word of struct seccomp_data, jump if equal, return.
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE = 0, 4


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _filter() -> bytes:
    architecture, number = _ARCHITECTURES[platform.machine()]
    return b"".join(
        (
            _instruction(_LOAD, _OFFSET_ARCHITECTURE),
            _instruction(_JUMP_EQUAL, architecture, if_false=3),
            _instruction(_LOAD, _OFFSET_NUMBER),
            _instruction(_JUMP_EQUAL, number, if_false=1),
            _instruction(_RETURN, _RET_ERRNO | errno.ENOSYS),
            _instruction(_RETURN, _RET_ALLOW),
        )
    )


def forbid_bpf() -> None:
    """Make bpf(2) fail with ENOSYS in this process and all it starts; cannot be undone."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter()
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def nobpf(*command: str) -> list[str]:
    """`command` with bpf(2) taken away, for subprocess."""
    return [sys.executable, __file__, *command]


if __name__ == "__main__":
    forbid_bpf()
    os.execvp(sys.argv[1], sys.argv[1:])
