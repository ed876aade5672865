"""Maps, links and pins: what stays in the kernel when the loader is gone."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import itertools
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Self, TypeVar

from . import libbpf

_T = TypeVar("_T")
_INFO_BYTES: Final = 256
_MOST_PROGRAMS: Final = 64
_MOST_MAPS: Final = 16
_BEFORE_ALL: Final = 1 << 3  # BPF_F_BEFORE, relative to nothing
_IF_NONE: Final = 1  # BPF_NOEXIST
_MOST_AT_ONCE: Final = 1024
_NOT_SUPPORTED: Final = 524  # the kernel's own ENOTSUPP, which libc has no name for


class MapType(enum.IntEnum):
    """Kinds of maps that are made here, not by loading an object (enum bpf_map_type)."""

    HASH = 1
    PROG_ARRAY = 3
    LPM_TRIE = 11
    RINGBUF = 27


class _CreateOptions(ctypes.Structure):
    """struct bpf_map_create_opts of libbpf 1.0, whose `sz` tells how much of it is known."""

    _fields_: ClassVar = [
        ("sz", ctypes.c_size_t),
        ("btf", ctypes.c_uint32 * 4),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
    ]


class AttachType(enum.IntEnum):
    """Where a program can be linked to (enum bpf_attach_type)."""

    SOCK_CREATE = 2
    SOCK_OPS = 3
    BIND4 = 8
    BIND6 = 9
    CONNECT4 = 10
    CONNECT6 = 11
    UDP4_SENDMSG = 14
    UDP6_SENDMSG = 15
    UDP4_RECVMSG = 19
    UDP6_RECVMSG = 20
    GETPEERNAME4 = 29
    GETPEERNAME6 = 30
    SK_LOOKUP = 36
    TCX_INGRESS = 46
    TCX_EGRESS = 47


class LinkType(enum.IntEnum):
    """What a link is attached to (enum bpf_link_type); more exist than are made here."""

    CGROUP = 3
    NETNS = 5
    TCX = 11


def _info(fd: int, question: bytes = b"") -> bytes:
    """What the kernel says of an fd, as struct bpf_{map,link,prog}_info.

    It is zero beyond what this kernel knows. `question` is the struct with the places to which
    the kernel shall copy lists.
    """
    raw = ctypes.create_string_buffer(question, _INFO_BYTES)
    size = ctypes.c_uint32(_INFO_BYTES)
    libbpf.call("bpf_obj_get_info_by_fd", fd, raw, ctypes.byref(size))
    return raw.raw


class KernelObject:
    """An fd of a map or a link; close it, or use it as a context manager."""

    def __init__(self, fd: int, name: str) -> None:
        """Take over `fd`; `name` is for people."""
        self.fd = fd
        self.name = name

    @classmethod
    def open_pinned(cls, path: Path | str) -> Self | None:
        """What is pinned at `path`, or None if nothing is.

        An enrolment opens dozens of them: text is put together quicker than a Path.
        """
        text = str(path)
        try:
            return cls(libbpf.call("bpf_obj_get", os.fsencode(text)), text.rpartition("/")[2])
        except FileNotFoundError:
            return None

    def pin(self, path: Path) -> None:
        """Keep it in the kernel for as long as the file `path` exists."""
        libbpf.call("bpf_obj_pin", self.fd, os.fsencode(path))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} fd {self.fd}>"


class Map(KernelObject):
    """A BPF map; keys and values are packed bytes."""

    def __init__(self, fd: int, name: str = "") -> None:
        """Take over `fd`, also if it is no map; without a `name` it is the one it was made with."""
        super().__init__(fd, name)
        try:
            info = _info(fd)
        except BaseException:
            self.close()
            raise
        fields = struct.unpack_from("=6I", info)
        self.kind, self.identifier, self.key_size, self.value_size, self.max_entries, _ = fields
        self.name = name or info[24:40].partition(b"\0")[0].decode(errors="replace")

    @classmethod
    def create(
        cls, kind: MapType, name: str, sizes: tuple[int, int], entries: int, flags: int
    ) -> Self:
        """A map of (key, value) sizes in bytes that lives as long as this fd or another map's."""
        options = _CreateOptions(sz=ctypes.sizeof(_CreateOptions), map_flags=flags)
        arguments = (kind, name.encode(), *sizes, entries, ctypes.byref(options))
        return cls(libbpf.call("bpf_map_create", *arguments), name)

    @classmethod
    def open_by_identifier(cls, identifier: int) -> Self:
        """The map with this id, under the name it was made with."""
        return cls(libbpf.call("bpf_map_get_fd_by_id", identifier))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(type, key size, value size): maps that differ here cannot stand in for each other."""
        return (self.kind, self.key_size, self.value_size)

    def get(self, key: bytes) -> bytes | None:
        """The value, or None; of a map of sockets it is the socket's cookie."""
        value = ctypes.create_string_buffer(self.value_size)
        try:
            libbpf.call("bpf_map_lookup_elem", self.fd, key, value)
        except FileNotFoundError:
            return None
        return value.raw

    def get_of_each_cpu(self, key: bytes) -> tuple[bytes, ...]:
        """The values of a per-CPU map, one for each CPU that this machine may ever have."""
        stride = (self.value_size + 7) & ~7
        values = ctypes.create_string_buffer(stride * libbpf.call("libbpf_num_possible_cpus"))
        libbpf.call("bpf_map_lookup_elem", self.fd, key, values)
        starts = range(0, len(values), stride)
        return tuple(values.raw[start : start + self.value_size] for start in starts)

    def put(self, key: bytes, value: bytes) -> None:
        libbpf.call("bpf_map_update_elem", self.fd, key, value, 0)

    def add(self, key: bytes, value: bytes) -> None:
        """Put it there if there is none; what is there stays."""
        with contextlib.suppress(FileExistsError):
            libbpf.call("bpf_map_update_elem", self.fd, key, value, _IF_NONE)

    def put_all(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Many at once, where the kernel takes them so (tries: Linux 5.13)."""
        for some in _chunks(entries, _MOST_AT_ONCE):
            keys, values = (b"".join(part) for part in zip(*some, strict=True))
            count = ctypes.c_uint32(len(some))
            try:
                arguments = (self.fd, keys, values, ctypes.byref(count), None)
                libbpf.call("bpf_map_update_batch", *arguments)
            except OSError as error:
                if error.errno not in (errno.EINVAL, _NOT_SUPPORTED):
                    raise
                for key, value in some:
                    self.put(key, value)

    def delete(self, key: bytes) -> None:
        """Remove a key; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            libbpf.call("bpf_map_delete_elem", self.fd, key)

    def keys(self) -> Iterator[bytes]:
        """All keys; one that another process removes meanwhile may restart the walk."""
        key: bytes | None = None
        for _ in range(2 * self.max_entries):
            following = ctypes.create_string_buffer(self.key_size)
            try:
                libbpf.call("bpf_map_get_next_key", self.fd, key, following)
            except FileNotFoundError:
                return
            key = following.raw
            yield key


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    following = iter(items)
    while chunk := list(itertools.islice(following, size)):
        yield chunk


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """What a link joins; `target` is a cgroup's id, a namespace's inode or a device's index.

    It is 0 once that is gone.
    """

    kind: int
    identifier: int
    program: int
    target: int
    attach_type: int


class _LinkOptions(ctypes.Structure):
    """The beginning of struct bpf_link_create_opts."""

    _fields_ = (("sz", ctypes.c_size_t), ("flags", ctypes.c_uint32))

    @classmethod
    def with_flags(cls, flags: int) -> Self:
        return cls(ctypes.sizeof(cls), flags)


class Link(KernelObject):
    """A program attached to a cgroup or network namespace for as long as an fd or a pin is left."""

    @classmethod
    def create(
        cls, program: int, target: int, attach_type: AttachType, *, first: bool = False
    ) -> Self:
        """Attach the program fd to `target`: the fd of a cgroup or namespace, or a device's index.

        An index is looked up in the network namespace of the calling thread. On a device, `first`
        has it run before the programs that are there.
        """
        options = ctypes.byref(_LinkOptions.with_flags(_BEFORE_ALL)) if first else None
        fd = libbpf.call("bpf_link_create", program, target, attach_type, options)
        return cls(fd, attach_type.name.lower())

    def detach(self) -> None:
        """Let the program run no more, whoever still holds the link (Linux 5.9)."""
        libbpf.call("bpf_link_detach", self.fd)

    def update(self, program: int) -> None:
        """Have the program fd run from now on, in the place of the one before."""
        libbpf.call("bpf_link_update", self.fd, program, None)

    def info(self) -> LinkInfo:
        raw = _info(self.fd)
        kind, identifier, program = struct.unpack_from("=III", raw)
        if kind == LinkType.CGROUP:
            target, attach_type = struct.unpack_from("=QI", raw, 16)
        else:
            target, attach_type = struct.unpack_from("=II", raw, 16)
        return LinkInfo(kind, identifier, program, target, attach_type)


def link_infos() -> Iterator[LinkInfo]:
    """Every link of these types on the machine (needs CAP_SYS_ADMIN).

    One that somebody is just making (EAGAIN) or removing is left out.
    """
    identifier = ctypes.c_uint32(0)
    passing = (FileNotFoundError, BlockingIOError)
    with contextlib.suppress(FileNotFoundError):
        while True:
            libbpf.call("bpf_link_get_next_id", identifier.value, ctypes.byref(identifier))
            with contextlib.suppress(*passing), _link_of(identifier.value) as link:
                info = link.info()
                if info.kind in set(LinkType):
                    yield info


def _link_of(identifier: int) -> Link:
    return Link(libbpf.call("bpf_link_get_fd_by_id", identifier), f"id {identifier}")


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """A loaded program: its name, cut off after 15 characters, and the ids of its maps."""

    name: str
    maps: tuple[int, ...]


def program_info(identifier: int) -> ProgramInfo | None:
    """What is known of a program (struct bpf_prog_info), or None if it is gone."""
    try:
        fd = libbpf.call("bpf_prog_get_fd_by_id", identifier)
    except FileNotFoundError:
        return None
    maps = (ctypes.c_uint32 * _MOST_MAPS)()
    question = bytearray(_INFO_BYTES)
    struct.pack_into("=IQ", question, 52, _MOST_MAPS, ctypes.addressof(maps))
    with KernelObject(fd, "program") as program:
        answer = _info(program.fd, bytes(question))
    (count,) = struct.unpack_from("=I", answer, 52)
    name = answer[64:80].partition(b"\0")[0].decode(errors="replace")
    return ProgramInfo(name, tuple(maps[: min(count, _MOST_MAPS)]))


def attached_programs(cgroup: int, attach_type: AttachType) -> tuple[tuple[int, ...], int]:
    """Ids of the programs on a cgroup (an fd) itself, in their order, and its attach flags."""
    count, flags = ctypes.c_uint32(_MOST_PROGRAMS), ctypes.c_uint32()
    identifiers = (ctypes.c_uint32 * _MOST_PROGRAMS)()
    asked = (cgroup, attach_type, 0, ctypes.byref(flags), identifiers, ctypes.byref(count))
    try:
        libbpf.call("bpf_prog_query", *asked)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    return tuple(identifiers[: min(count.value, _MOST_PROGRAMS)]), flags.value
