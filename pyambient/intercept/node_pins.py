"""The pins below a site's directory of bpffs: where they are, and what they hold."""

from __future__ import annotations

import contextlib
import errno
import functools
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from pyambient.errors import PyambientError

from .kernel_objects import Link, Map, program_info
from .node_hooks import ALL_HOOKS, ALL_MAPS, SHARED, Hook, SharedProgram


def pod_directory(bpffs: Path, uid: str) -> Path:
    """Where a pod's pins are; bpffs reserves names with a dot (ENOENT or EPERM)."""
    return bpffs / "pods" / urllib.parse.quote(uid, safe="").replace(".", "%2E")


def detach_pinned(pin: Path) -> None:
    """Let a pinned link's program run no more; that nothing is pinned there is no error.

    Now: a link that just loses its last pin is freed some time later.
    """
    link = Link.open_pinned(pin)
    if link is not None:
        with link:
            link.detach()


def node_map(bpffs: Path | str, name: str) -> Map | None:
    """A map of the node, or None where no pod is enrolled."""
    return Map.open_pinned(f"{bpffs}/node/{name}")


def existing_map(bpffs: Path | str, name: str) -> Map:
    """A map of the node; PyambientError where it is gone."""
    found = node_map(bpffs, name)
    if found is None:
        raise PyambientError(f"the BPF map {bpffs}/node/{name} is gone", "enrol the pod again")
    return found


def pinned_maps(directory: Path) -> Iterator[Map]:
    """Those of the node's maps that are pinned; whoever takes one closes it."""
    for name in ALL_MAPS:
        pinned = Map.open_pinned(f"{directory}/{name}")
        if pinned is not None:
            yield pinned


def pinned_identifiers(directory: Path) -> dict[str, int]:
    """Name and id of each."""
    with contextlib.ExitStack() as stack:
        return {m.name: stack.enter_context(m).identifier for m in pinned_maps(directory)}


def _program_of(directory: Path, where: Hook | SharedProgram) -> int:
    """The id of the program that runs there; 0 where none does."""
    if isinstance(where, SharedProgram):
        return _shared_program(directory, where)
    link = Link.open_pinned(directory / where.pin)
    if link is None:
        return 0
    with link:
        return link.info().program


def _shared_program(directory: Path, shared: SharedProgram) -> int:
    array = Map.open_pinned(directory / shared.map)
    if array is None:
        return 0
    with array:
        return int.from_bytes(array.get(bytes(4)) or b"", sys.byteorder)


def uses_pinned_maps(bpffs: Path | str, program: int) -> bool:
    """Whether a program works with the maps of the node that are pinned now, not with others."""
    for name, identifier in _node_maps_of(program):
        pinned = node_map(bpffs, name)
        if pinned is None:
            return False
        with pinned:
            if pinned.identifier != identifier:
                return False
    return True


@functools.lru_cache(maxsize=4096)
def _node_maps_of(program: int) -> tuple[tuple[str, int], ...]:
    """Name and id of the node's maps that a program uses, which are always the same ones."""
    info = program_info(program)
    found = []
    for identifier in info.maps if info else ():
        with Map.open_by_identifier(identifier) as held:
            if held.name in ALL_MAPS:
                found.append((held.name, identifier))
    return tuple(found)


def uses(directory: Path, where: Hook | SharedProgram, pinned: dict[str, int]) -> bool:
    """Whether a program is there and works with the maps that are pinned, not with others."""
    program = _program_of(directory, where)
    return program != 0 and all(
        pinned.get(name) == identifier for name, identifier in _node_maps_of(program)
    )


def pin_used_maps(directory: Path) -> None:
    """Pin maps again whose pins somebody removed or replaced: the attached programs have them.

    A map made anew would not know the listeners that the proxy has already.
    """
    done: set[str] = set()
    everywhere: tuple[Hook | SharedProgram, ...] = (*ALL_HOOKS, *SHARED)
    for where in everywhere:
        for name, identifier in _node_maps_of(_program_of(directory, where)):
            if name not in done:
                done.add(name)
                with Map.open_by_identifier(identifier) as held:
                    _pin_instead(held, directory / name)


def _pin_instead(used: Map, path: Path) -> None:
    pinned = Map.open_pinned(path)
    if pinned is not None:
        with pinned:
            if pinned.identifier == used.identifier:
                return
    path.unlink(missing_ok=True)
    used.pin(path)


def remove(directory: Path) -> None:
    """Unpin what is in a directory and remove it; one that is not there or not empty is left."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for pin in directory.iterdir():
            if not pin.is_dir():
                pin.unlink()
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise
