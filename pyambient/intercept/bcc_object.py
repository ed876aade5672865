"""The second loader: bcc compiles the same C sources at load time.

General theory of operation
---------------------------
What `loader` does with a compiled object is done here with a source: constants become -D options,
and bcc makes all maps of the source at once. A map that is to be an existing one is exchanged
before the programs are loaded: they name it by its file descriptor's number, and dup2() lets that
number mean another map. Which type a program has is what its SEC() says, which bcc itself does not
read.

It needs python3-bpfcc (of the distribution: what is called bcc on PyPI is something else), LLVM,
and kernel headers (`kernel_headers`), takes around a second for a source, and leaves the very same
programs, maps and links in the kernel. It is for who changes the C and for who wants to see it
compiled where it runs.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from typing import Any, Final, Self

from pyambient.errors import PyambientError

from .kernel_headers import with_headers
from .kernel_objects import AttachType, Map
from .loader import LOG_END, OBJECTS, Constants, ProgramRefused, refuse_other_shape

SOURCES: Final = OBJECTS / "source"
_DISTRIBUTION: Final = "/usr/lib/python3/dist-packages"
_LOG_BYTES: Final = 1 << 20
_NO_ATTACH_TYPE: Final = -1
# How compat.h names the pattern of a map's inner maps, which libbpf keeps to itself.
_PATTERN: Final = "_inner"
_PROGRAM: Final = re.compile(r'^SEC\("([^"]+)"\)\s+int (\w+)\(', re.MULTILINE)
# enum bpf_prog_type, and the attach type that the verifier wants to know.
_SECTIONS: Final = {
    "cgroup/sock_create": (9, AttachType.SOCK_CREATE),
    "sockops": (13, AttachType.SOCK_OPS),
    "cgroup/bind4": (18, AttachType.BIND4),
    "cgroup/bind6": (18, AttachType.BIND6),
    "cgroup/connect4": (18, AttachType.CONNECT4),
    "cgroup/connect6": (18, AttachType.CONNECT6),
    "cgroup/sendmsg4": (18, AttachType.UDP4_SENDMSG),
    "cgroup/sendmsg6": (18, AttachType.UDP6_SENDMSG),
    "cgroup/recvmsg4": (18, AttachType.UDP4_RECVMSG),
    "cgroup/recvmsg6": (18, AttachType.UDP6_RECVMSG),
    "cgroup/getpeername4": (18, AttachType.GETPEERNAME4),
    "cgroup/getpeername6": (18, AttachType.GETPEERNAME6),
    "sk_lookup": (30, AttachType.SK_LOOKUP),
    "tc": (3, _NO_ATTACH_TYPE),
}


@functools.cache
def _bcc() -> Any:
    """The distribution's package `bcc`, from within any virtual environment."""
    spec = PathFinder.find_spec("bcc", [_DISTRIBUTION])
    if spec is None or spec.loader is None:
        raise PyambientError(
            "bcc's Python bindings are not installed",
            "run 'apt install python3-bpfcc', or use --bpf-loader libbpf",
        )
    package = sys.modules["bcc"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    library = package.lib
    library.bpf_num_tables.restype = ctypes.c_size_t
    library.bpf_num_tables.argtypes = [ctypes.c_void_p]
    library.bpf_table_name.restype = ctypes.c_char_p
    library.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return package


class BccObject:
    """A compiled source and what was loaded of it; close it, or use it as a context manager."""

    def __init__(self, name: str, constants: Constants) -> None:
        """Compile `objects/source/<name>.bpf.c`; PyambientError if that cannot be."""
        self.name = name
        self._text = (SOURCES / f"{name}.bpf.c").read_text(encoding="utf-8")
        self._programs: dict[str, int] = {}
        self._lib = _bcc().lib
        self._compiled = with_headers(lambda: _compile(name, self._text, _flags(constants)))

    def share_maps(self, shared: Mapping[str, Map]) -> None:
        """Let existing maps stand in for those of the same name."""
        for name, fd in self._map_fds().items():
            if name in shared:
                with Map(os.dup(fd), name) as own:
                    refuse_other_shape(shared[name], own.shape)
                os.dup2(shared[name].fd, fd, inheritable=False)

    def load(self) -> None:
        """Have all programs verified; ProgramRefused says why not."""
        for section, function in _PROGRAM.findall(self._text):
            kind, attach_type = _SECTIONS[section]
            self._programs[function] = self._load_program(function, kind, attach_type)

    def _load_program(self, function: str, kind: int, attach_type: int) -> int:
        module, name, lib = self._compiled.module, function.encode(), self._lib
        log = ctypes.create_string_buffer(_LOG_BYTES)
        fd: int = lib.bcc_func_load(
            *(module, kind, name),
            *(lib.bpf_function_start(module, name), lib.bpf_function_size(module, name)),
            *(lib.bpf_module_license(module), lib.bpf_module_kern_version(module)),
            *(0, log, len(log), None, attach_type),
        )
        if fd < 0:
            code = ctypes.get_errno()
            lines = (*log.value.decode(errors="replace").splitlines(), LOG_END)
            raise ProgramRefused(self.name, OSError(code, os.strerror(code)), lines)
        return fd

    def program_fd(self, name: str) -> int:
        """A loaded program's fd; it belongs to the object."""
        return self._programs[name]

    def maps(self) -> dict[str, Map]:
        """The maps by name, as handles of their own."""
        return {name: Map(os.dup(fd), name) for name, fd in self._map_fds().items()}

    def _map_fds(self) -> dict[str, int]:
        module, lib = self._compiled.module, self._lib
        raw = [lib.bpf_table_name(module, i) for i in range(lib.bpf_num_tables(module))]
        names = [name.decode() for name in raw]
        return {
            name: lib.bpf_table_fd(module, name.encode())
            for name in names
            if not name.endswith(_PATTERN)
        }

    def close(self) -> None:
        """Give up the programs and maps that no link, pin or other handle holds."""
        while self._programs:
            os.close(self._programs.popitem()[1])
        if self._compiled.module is not None:
            atexit.unregister(self._compiled.cleanup)
            self._compiled.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BccObject {self.name}{'' if self._compiled.module else ' closed'}>"


def _flags(constants: Constants) -> list[str]:
    values = dataclasses.asdict(constants)
    given = [f"-DPYAMBIENT_{name}={int(value)}ULL" for name, value in values.items()]
    return ["-DPYAMBIENT_BCC", f"-I{SOURCES}", *given]


def _compile(name: str, text: str, flags: list[str]) -> Any:
    try:
        return _bcc().BPF(text=text.encode(), cflags=flags)
    except Exception as error:
        raise PyambientError(  # bcc raises just Exception; why is on stderr, from clang itself
            f"bcc cannot compile {name}.bpf.c: {error}", "use --bpf-loader libbpf"
        ) from error


def load(name: str, constants: Constants, shared: Mapping[str, Map]) -> BccObject:
    """Compile, share and load in one go; the object is closed again if that fails."""
    loaded = BccObject(name, constants)
    try:
        loaded.share_maps(shared)
        loaded.load()
    except BaseException:
        loaded.close()
        raise
    return loaded
