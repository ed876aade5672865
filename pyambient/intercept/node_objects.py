"""The loaded objects behind the node's programs, and those that are loaded before a pod comes.

General theory of operation
---------------------------
The verifier takes tens of milliseconds for all programs of a node, which the first pod would wait
for. So an agent has them loaded when it starts: verified, with maps of their own, and neither
attached nor pinned. Nothing runs, and nothing is left when the agent ends. The first pod pins
these maps and attaches these programs. The last pod takes pins and links along, and the agent
still has the objects, for the next first pod.

Whatever a pod may leave in a map is keyed by the cookie of its namespace, which no other one ever
has. `probes` is not: its keys are the ends of connections, so it is emptied in between.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Self

from .kernel_objects import Map, MapType
from .loader import Constants, LoadedObject, load
from .node_hooks import SHARED, SharedProgram

_KEYED_BY_ENDS: Final = "probes"
_ONLY: Final = struct.pack("=I", 0)


class NodeObjects:
    """Loaded objects that share their maps; close them, or use them as a context manager."""

    def __init__(
        self, sources: Iterable[str], constants: Constants, known: Mapping[str, Map] | None = None
    ) -> None:
        """Load `sources`; maps in `known` are used, the others are made."""
        self._known = dict(known or {})
        self._made: dict[str, Map] = {}
        self._objects: dict[str, LoadedObject] = {}
        try:
            for source in dict.fromkeys(sources):
                self._load(source, constants)
        except BaseException:
            self.close()
            raise

    def _load(self, source: str, constants: Constants) -> None:
        shared = self._known | self._made
        self._objects[source] = loaded = load(source, constants, shared)
        for name, held in loaded.maps().items():
            if name in shared:
                held.close()
            else:
                self._made[name] = held
        for shared_program in SHARED:
            if shared_program.source == source:
                self._offer(shared_program)

    def _offer(self, shared: SharedProgram) -> None:
        """Have the pods' entries go on to a program of these objects."""
        array = self._known.get(shared.map)
        if array is None:
            array = Map.create(MapType.PROG_ARRAY, shared.map, (4, 4), 1, 0)
            self._made[shared.map] = array
        program = self._objects[shared.source].program_fd(shared.program)
        array.put(_ONLY, struct.pack("=I", program))

    def program_fd(self, source: str, program: str) -> int:
        """A program's fd; it belongs to the objects."""
        return self._objects[source].program_fd(program)

    def pin_maps(self, directory: Path) -> None:
        """Pin the maps that were made for these objects."""
        for name, made in self._made.items():
            made.pin(directory / name)

    def empty(self) -> None:
        """Forget what another pod of before may have left."""
        left = self._made[_KEYED_BY_ENDS]
        for key in list(left.keys()):
            left.delete(key)

    def close(self) -> None:
        for loaded in self._objects.values():
            loaded.close()
        for made in self._made.values():
            made.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<NodeObjects {' '.join(self._objects)}>"


class Ahead:
    """What this process has loaded ahead, for a directory of bpffs each."""

    def __init__(self) -> None:
        self._held: dict[tuple[Path, tuple[str, ...], Constants], NodeObjects] = {}

    def load(self, bpffs: Path, sources: tuple[str, ...], constants: Constants) -> None:
        """Have these objects loaded until `close`."""
        key = (bpffs, sources, constants)
        if key not in self._held:
            self._held[key] = NodeObjects(sources, constants)

    def find(
        self, bpffs: Path, sources: tuple[str, ...], constants: Constants
    ) -> NodeObjects | None:
        """These objects, if they are loaded; for who has none of their maps pinned there."""
        found = self._held.get((bpffs, sources, constants))
        if found is not None:
            found.empty()
        return found

    def close(self) -> None:
        while self._held:
            self._held.popitem()[1].close()

    def __repr__(self) -> str:
        return f"<Ahead {list(self._held.values())}>"


# Of the process, as what is loaded is: steps are values, and have nothing to hold it with.
ahead: Final = Ahead()
