"""Loading a compiled BPF object: constants in, maps shared, programs verified.

General theory of operation
---------------------------
An object is one `bpf/*.bpf.c`, compiled. Between opening it and loading it two things can still
be chosen: the values of its constants (`struct constants` in compat.h: the verifier takes them as
known and skips the branches they close), and which of its maps are existing ones instead of its
own. After the load the object is nothing but the owner of file descriptors; links and pins hold
what has to outlive it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, Self

from pyambient.errors import PyambientError

from . import libbpf
from .kernel_objects import Map

OBJECTS: Final = Path(__file__).with_name("objects")
LOG_END: Final = "-- END PROG LOAD LOG --"
# What the verifier says at the end whether it liked the program or not.
_CHATTER: Final = (
    "processed ",
    LOG_END,
    "verification time",
    "stack depth",
    "max_states",
    "peak_states",
)


class ProgramRefused(PyambientError):
    """The kernel refused a program; `log` is all that its verifier and libbpf said."""

    def __init__(self, name: str, error: OSError, log: tuple[str, ...]) -> None:
        no_system_call = error.errno == errno.ENOSYS  # libbpf makes a paragraph of it
        reason = ("" if no_system_call else last_informative(log)) or error.strerror
        super().__init__(f"the kernel refused {name}.o: {reason}", "run 'pyambient check'")
        self.errno = error.errno
        self.log = log


def last_informative(log: tuple[str, ...]) -> str:
    """The verifier's reason: the last line of its log that is not a statistic.

    Without a verifier log it is the first line that libbpf printed; "" if there is none.
    """
    end = next((i for i, line in enumerate(log) if LOG_END in line), None)
    if end is None:
        return log[0].removeprefix("libbpf: ").strip() if log else ""
    for line in reversed(log[:end]):
        if line.strip() and not line.removeprefix("libbpf: ").startswith(_CHATTER):
            return line.strip()
    return ""


@dataclass(frozen=True, slots=True)
class Constants:
    """`struct constants` of bpf/compat.h."""

    netns: int = 0
    node: int = 0
    has_ingress_ifindex: bool = False
    has_set_retval: bool = False
    is_ethernet: bool = False
    counts_only: bool = False
    sign: int = 0

    def packed(self) -> bytes:
        return struct.pack("=QQ5I4x", *dataclasses.astuple(self))


class BpfObject:
    """An object file in memory; close it, or use it as a context manager."""

    def __init__(self, name: str) -> None:
        """Open `objects/<name>.o`; PyambientError if it was never compiled or is damaged."""
        self.name = name
        path = OBJECTS / f"{name}.o"
        if not path.is_file():
            raise PyambientError(f"the BPF program {path} is missing", "run 'make -C bpf'")
        self._handle: int | None = None
        try:
            self._handle = libbpf.call("bpf_object__open_file", os.fsencode(path), None)
        except OSError as error:
            raise PyambientError(
                f"{path} is damaged: {error.strerror}", "run 'make -C bpf clean all'"
            ) from None

    def set_constants(self, constants: Constants) -> None:
        """Fill in the constants; an object that declares none has nothing to fill in."""
        rodata = libbpf.ask("bpf_object__find_map_by_name", self._handle, b".rodata")
        if rodata is None:
            return
        size = ctypes.c_size_t()
        place = libbpf.call("bpf_map__initial_value", rodata, ctypes.byref(size))
        raw = constants.packed()
        if size.value != len(raw):
            raise PyambientError(
                f"{self.name}.o has constants of another version", "run 'make -C bpf clean all'"
            )
        ctypes.memmove(place, raw, len(raw))

    def share_maps(self, shared: Mapping[str, Map]) -> None:
        """Let the object use existing maps in place of its own ones of the same name."""
        for name, handle in self._map_handles().items():
            if name not in shared:
                continue
            refuse_other_shape(shared[name], _shape(handle))
            libbpf.call("bpf_map__reuse_fd", handle, shared[name].fd)

    def load(self) -> None:
        """Have all programs verified and all maps made; ProgramRefused says why not."""
        try:
            libbpf.call("bpf_object__load", self._handle)
        except OSError as error:
            raise ProgramRefused(self.name, error, libbpf.last_log()) from None

    def program_fd(self, name: str) -> int:
        """A loaded program's fd; it belongs to the object."""
        handle = libbpf.call("bpf_object__find_program_by_name", self._handle, name.encode())
        return int(libbpf.call("bpf_program__fd", handle))

    def maps(self) -> dict[str, Map]:
        """The maps of the loaded object by name, as handles of their own; .rodata is left out."""
        return {
            name: Map(os.dup(libbpf.call("bpf_map__fd", handle)), name)
            for name, handle in self._map_handles().items()
        }

    def _map_handles(self) -> dict[str, int]:
        handles: dict[str, int] = {}
        handle = libbpf.ask("bpf_object__next_map", self._handle, None)
        while handle is not None:
            name = libbpf.ask("bpf_map__name", handle).decode()
            if "." not in name:
                handles[name] = handle
            handle = libbpf.ask("bpf_object__next_map", self._handle, handle)
        return handles

    def close(self) -> None:
        """Give up the programs and maps that no link, pin or other handle holds."""
        if self._handle is not None:
            libbpf.ask("bpf_object__close", self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BpfObject {self.name}{'' if self._handle else ' closed'}>"


def _shape(handle: int) -> tuple[int, int, int]:
    kind, key, value = (
        libbpf.ask(f"bpf_map__{what}", handle) for what in ("type", "key_size", "value_size")
    )
    return (kind, key, value)


def refuse_other_shape(existing: Map, shape: tuple[int, int, int]) -> None:
    """PyambientError for an existing map that cannot stand in for one of this shape."""
    if existing.shape != shape:
        raise PyambientError(
            f"the pinned map {existing.name} is of another version of pyambient",
            "run 'pyambient unenroll --all' first",
        )


class LoadedObject(Protocol):
    """What a loader gives: the owner of loaded programs and of their maps."""

    def program_fd(self, name: str) -> int: ...

    def maps(self) -> dict[str, Map]: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


Loader = Callable[[str, Constants, Mapping[str, Map]], LoadedObject]


def load_compiled(name: str, constants: Constants, shared: Mapping[str, Map]) -> BpfObject:
    """Open, fill in, share and load in one go; the object is closed again if that fails."""
    loaded = BpfObject(name)
    try:
        loaded.set_constants(constants)
        loaded.share_maps(shared)
        loaded.load()
    except BaseException:
        loaded.close()
        raise
    return loaded


_chosen: Loader = load_compiled


def use(name: str) -> None:
    """Load by "libbpf" or by "bcc" from here on, in this process.

    Of the process and not of a pod: what is in the kernel afterwards is the same, so no record
    has to tell, and either loader goes on where the other one stopped.
    """
    global _chosen  # noqa: PLW0603 - one choice a process, made once at its start
    if name == "bcc":
        from .bcc_object import load as load_by_bcc  # noqa: PLC0415 - LLVM, for who asks for it

        _chosen = load_by_bcc
    else:
        _chosen = load_compiled


def load(
    name: str, constants: Constants | None = None, shared: Mapping[str, Map] | None = None
) -> LoadedObject:
    """Have the programs of `bpf/<name>.bpf.c` in the kernel, by the loader in use."""
    return _chosen(name, constants or Constants(), shared or {})
