"""A pod's entry to a program that all pods of a node share.

General theory of operation
---------------------------
The kernel verifies a program whenever it is loaded: milliseconds for what steers and what guards.
Neither can ask on every kernel whose connection or packet it sees, so one program on the hooks of
all pods would not know. What a pod gets is its entry: a few instructions that say whose it is, and
go on to the one program of the node by a tail call.

sk_lookup can write into nothing of its own, so its entry says it in a per-CPU map. The entry of a
device says it in skb->cb, which is the hook's to use.

A program is called by way of an array of one. The kernel empties it when it is neither pinned nor
held open; an entry that leads nowhere drops.
"""

from __future__ import annotations

import ctypes
import enum
import struct
from typing import ClassVar, Final

from . import libbpf
from .kernel_objects import AttachType, KernelObject, Map

# Operation codes of linux/bpf.h and linux/bpf_common.h.
_ADD, _MOVE, _MOVE_REGISTER, _IMMEDIATE = 0x07, 0xB7, 0xBF, 0x18
_LOAD16, _LOAD32 = 0x69, 0x61
_STORE16, _STORE32, _STORE64, _STORE32_IMMEDIATE = 0x6B, 0x63, 0x7B, 0x62
_JUMP_IF_EQUAL, _CALL, _EXIT = 0x15, 0x85, 0x95
_MAP_FD: Final = 1  # BPF_PSEUDO_MAP_FD
_MAP_LOOKUP, _TAIL_CALL = 1, 12  # enum bpf_func_id
_RESULT, _FIRST, _SECOND, _THIRD, _KEPT, _FRAME = 0, 1, 2, 3, 6, 10

_SK_LOOKUP, _SCHED_CLS = 30, 3  # enum bpf_prog_type
_LICENSE: Final = b"Dual BSD/GPL"
_SK_DROP, _TC_ACT_SHOT = 0, 2
# In struct bpf_sk_lookup, struct __sk_buff and struct entered (bpf/maps.h).
_REMOTE_PORT, _LOCAL_PORT = 36, 60
_CB: Final = 48
_NETNS, _ENTERED_REMOTE, _ENTERED_LOCAL = 0, 8, 10


class Choice(enum.IntFlag):
    """What the guard is told of a device (bpf/guard.bpf.c)."""

    IS_ETHERNET = 1
    COUNTS_ONLY = 2


class _LoadOptions(ctypes.Structure):
    """The beginning of struct bpf_prog_load_opts of libbpf 1.0."""

    _fields_: ClassVar = [
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_int),
    ]


def lookup_entry(name: str, program: Map, entered: Map, netns: int) -> KernelObject:
    """For the network namespace with this cookie: an entry to what is in the array `program`."""
    say = (
        _instruction(_STORE32_IMMEDIATE, _FRAME, offset=-4)
        + _instruction(_MOVE_REGISTER, _SECOND, _FRAME)
        + _instruction(_ADD, _SECOND, value=-4)
        + _map(_FIRST, entered)
        + _instruction(_CALL, value=_MAP_LOOKUP)
    )
    write = (
        _wide(_FIRST, netns)
        + _instruction(_STORE64, _RESULT, _FIRST, _NETNS)
        + _instruction(_LOAD16, _FIRST, _KEPT, _REMOTE_PORT)
        + _instruction(_STORE16, _RESULT, _FIRST, _ENTERED_REMOTE)
        + _instruction(_LOAD32, _FIRST, _KEPT, _LOCAL_PORT)
        + _instruction(_STORE16, _RESULT, _FIRST, _ENTERED_LOCAL)
        + _instruction(_MOVE_REGISTER, _FIRST, _KEPT)
        + _go_on(program)
    )
    code = (
        _instruction(_MOVE_REGISTER, _KEPT, _FIRST)
        + say
        + _instruction(_JUMP_IF_EQUAL, _RESULT, offset=len(write) // 8)
        + write
        + _return(_SK_DROP)
    )
    return _load(name, _SK_LOOKUP, code, AttachType.SK_LOOKUP)


def device_entry(
    name: str, program: Map, netns: int, choices: Choice, sign: int = 0
) -> KernelObject:
    """For a device of the network namespace with this cookie."""
    words = (netns & 0xFFFFFFFF, netns >> 32, choices, sign)
    write = b"".join(
        _instruction(_MOVE, _SECOND, value=word)
        + _instruction(_STORE32, _FIRST, _SECOND, _CB + 4 * place)
        for place, word in enumerate(words)
    )
    return _load(name, _SCHED_CLS, write + _go_on(program) + _return(_TC_ACT_SHOT))


def _go_on(program: Map) -> bytes:
    """The context is in the first register."""
    return (
        _map(_SECOND, program) + _instruction(_MOVE, _THIRD) + _instruction(_CALL, value=_TAIL_CALL)
    )


def _return(verdict: int) -> bytes:
    return _instruction(_MOVE, _RESULT, value=verdict) + _instruction(_EXIT)


def _map(register: int, named: Map) -> bytes:
    return _instruction(_IMMEDIATE, register, _MAP_FD, value=named.fd) + _instruction(0)


def _wide(register: int, value: int) -> bytes:
    low, high = value & 0xFFFFFFFF, value >> 32
    return _instruction(_IMMEDIATE, register, value=low) + _instruction(0, value=high)


def _instruction(code: int, to: int = 0, of: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """A struct bpf_insn, whose first register is in the low half of its byte."""
    return struct.pack("=BBhI", code, of << 4 | to, offset, value & 0xFFFFFFFF)


def _load(name: str, kind: int, code: bytes, attach_type: int = 0) -> KernelObject:
    options = _LoadOptions(ctypes.sizeof(_LoadOptions), 1, attach_type)
    arguments = (kind, name.encode(), _LICENSE, code, len(code) // 8, ctypes.byref(options))
    return KernelObject(libbpf.call("bpf_prog_load", *arguments), name)
