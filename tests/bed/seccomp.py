"""A kernel without bpf(2), or one that lets nothing be attached, for a process and its children.

A seccomp filter answers: ENOSYS, as a kernel built without CONFIG_BPF_SYSCALL does, or EPERM to
what attaches programs, as in a container that may only load them. `python seccomp.py bpf COMMAND`
runs a command without bpf(2), `python seccomp.py attach COMMAND` one that cannot attach;
`forbid_bpf` takes bpf(2) from the calling process, for good.
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
# The first argument's lower half; both machines are little-endian.
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENT = 0, 4, 16
_BPF_PROG_ATTACH, _BPF_LINK_CREATE = 8, 28


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _filter(error: int, commands: tuple[int, ...]) -> bytes:
    """What fails with this error: these commands of bpf(2), or all if none is named."""
    architecture, number = _ARCHITECTURES[platform.machine()]
    tests = [_instruction(_LOAD, _OFFSET_ARGUMENT)] if commands else []
    for left, command in enumerate(reversed(commands)):
        tests.insert(1, _instruction(_JUMP_EQUAL, command, if_true=left + 1))
    tests += [_instruction(_RETURN, _RET_ALLOW)] if commands else []
    refused = len(tests) + 1
    return b"".join(
        (
            _instruction(_LOAD, _OFFSET_ARCHITECTURE),
            _instruction(_JUMP_EQUAL, architecture, if_false=refused + 2),
            _instruction(_LOAD, _OFFSET_NUMBER),
            _instruction(_JUMP_EQUAL, number, if_false=refused),
            *tests,
            _instruction(_RETURN, _RET_ERRNO | error),
            _instruction(_RETURN, _RET_ALLOW),
        )
    )


def forbid_bpf() -> None:
    """Make bpf(2) fail with ENOSYS in this process and all it starts; cannot be undone."""
    _apply(_filter(errno.ENOSYS, ()))


def forbid_attaching() -> None:
    """Make bpf(2) fail with EPERM where it attaches programs, likewise; not filters of tc."""
    _apply(_filter(errno.EPERM, (_BPF_PROG_ATTACH, _BPF_LINK_CREATE)))


def _apply(code: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
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
    return [sys.executable, __file__, "bpf", *command]


def noattach(*command: str) -> list[str]:
    """`command` that cannot attach programs, for subprocess."""
    return [sys.executable, __file__, "attach", *command]


if __name__ == "__main__":
    {"bpf": forbid_bpf, "attach": forbid_attaching}[sys.argv[1]]()
    os.execvp(sys.argv[2], sys.argv[2:])
