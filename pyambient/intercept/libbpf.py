"""The few functions of libbpf 1.x that are used here, through ctypes.

General theory of operation
---------------------------
libbpf parses an object file, relocates its maps and asks the kernel to verify its programs. All
that is C code that every distribution ships (385 kB), so a node needs no compiler, no kernel
headers and no Python extension. libbpf 1.0 and later raise RLIMIT_MEMLOCK themselves on kernels
that charge it for maps (before 5.11), return negative errno values, and set errno with a NULL.

What a function did wrong is an `OSError` here. Why the verifier refused a program is in a log that
libbpf prints; `last_log()` is what it printed during the last call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, Final

from pyambient.errors import PyambientError

_WARNING: Final = 0
_LOG_BYTES: Final = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)

# Result type first. A pointer result is NULL on failure, an int negative.
_PROTOTYPES: Final[dict[str, tuple[Any, ...]]] = {
    "bpf_object__open_file": (c_void_p, c_char_p, c_void_p),
    "bpf_object__load": (c_int, c_void_p),
    "bpf_object__close": (None, c_void_p),
    "bpf_object__find_program_by_name": (c_void_p, c_void_p, c_char_p),
    "bpf_object__find_map_by_name": (c_void_p, c_void_p, c_char_p),
    "bpf_object__next_map": (c_void_p, c_void_p, c_void_p),
    "bpf_program__fd": (c_int, c_void_p),
    "bpf_map__fd": (c_int, c_void_p),
    "bpf_map__name": (c_char_p, c_void_p),
    "bpf_map__type": (c_uint32, c_void_p),
    "bpf_map__key_size": (c_uint32, c_void_p),
    "bpf_map__value_size": (c_uint32, c_void_p),
    "bpf_map__max_entries": (c_uint32, c_void_p),
    "bpf_map__initial_value": (c_void_p, c_void_p, POINTER(c_size_t)),
    "bpf_map__reuse_fd": (c_int, c_void_p, c_int),
    "libbpf_num_possible_cpus": (c_int,),
    "bpf_map_create": (c_int, c_uint32, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p),
    "bpf_map_get_fd_by_id": (c_int, c_uint32),
    "bpf_map_lookup_elem": (c_int, c_int, c_void_p, c_void_p),
    "bpf_map_update_elem": (c_int, c_int, c_void_p, c_void_p, c_uint64),
    "bpf_map_update_batch": (c_int, c_int, c_void_p, c_void_p, POINTER(c_uint32), c_void_p),
    "bpf_map_delete_elem": (c_int, c_int, c_void_p),
    "bpf_map_get_next_key": (c_int, c_int, c_void_p, c_void_p),
    "bpf_link_create": (c_int, c_int, c_int, c_int, c_void_p),
    "bpf_link_detach": (c_int, c_int),
    "bpf_link_update": (c_int, c_int, c_int, c_void_p),
    "bpf_link_get_next_id": (c_int, c_uint32, POINTER(c_uint32)),
    "bpf_link_get_fd_by_id": (c_int, c_uint32),
    "bpf_prog_get_fd_by_id": (c_int, c_uint32),
    "bpf_prog_load": (c_int, c_uint32, c_char_p, c_char_p, c_char_p, c_size_t, c_void_p),
    "bpf_prog_query": (
        c_int, c_int, c_int, c_uint32, POINTER(c_uint32), c_void_p, POINTER(c_uint32),
    ),
    "bpf_tc_hook_create": (c_int, c_void_p),
    "bpf_tc_hook_destroy": (c_int, c_void_p),
    "bpf_tc_attach": (c_int, c_void_p, c_void_p),
    "bpf_tc_detach": (c_int, c_void_p, c_void_p),
    "bpf_tc_query": (c_int, c_void_p, c_void_p),
    "ring_buffer__new": (c_void_p, c_int, c_void_p, c_void_p, c_void_p),
    "ring_buffer__consume": (c_int, c_void_p),
    "ring_buffer__free": (None, c_void_p),
    "bpf_obj_pin": (c_int, c_int, c_char_p),
    "bpf_obj_get": (c_int, c_char_p),
    "bpf_obj_get_info_by_fd": (c_int, c_int, c_void_p, POINTER(c_uint32)),
}  # fmt: skip

_Printer = ctypes.CFUNCTYPE(c_int, c_int, c_void_p, c_void_p)


class _Log(threading.local):
    """What libbpf printed to this thread: others may be loading meanwhile."""

    def __init__(self) -> None:
        self.lines: list[str] = []


_log = _Log()


def _keep(level: int, form: int, arguments: int) -> int:
    """Keep what libbpf prints; a va_list is passed on as the pointer it is on 64-bit ABIs."""
    if level == _WARNING:
        text = ctypes.create_string_buffer(_LOG_BYTES)
        _libc.vsnprintf(text, c_size_t(_LOG_BYTES), c_void_p(form), c_void_p(arguments))
        _log.lines.append(text.value.decode(errors="replace"))
    return 0


# The library calls this for as long as it is loaded, so the reference has to stay.
_printer = _Printer(_keep)


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise PyambientError(
            "libbpf.so.1 is not installed", "run 'apt install libbpf1', or use --backend iptables"
        ) from None
    for name, (result, *arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def ask(function: str, *arguments: Any) -> Any:
    """Call a function of libbpf that cannot fail, or whose NULL is an answer."""
    _log.lines.clear()
    library = _library()
    library.libbpf_set_print(_printer)  # each time: bcc, in the same process, sets its own
    return getattr(library, function)(*arguments)


def call(function: str, *arguments: Any) -> Any:
    """Call a function of libbpf that returns an int or a pointer; OSError where it fails."""
    result = ask(function, *arguments)
    pointer = _PROTOTYPES[function][0] is c_void_p
    if result is None or (not pointer and result < 0):
        code = ctypes.get_errno() if pointer else -result
        raise OSError(code, os.strerror(code), function)
    return result


def last_log() -> tuple[str, ...]:
    """The warnings that libbpf printed during the last call, line by line."""
    return tuple("".join(_log.lines).splitlines())
