"""A pod's selections in BPF maps: what bpf/selection.h reads.

The map `selections` of the node holds a trie for each pod and direction that has a selection. A
trie is filled before it is put there, so that a selection changes at one moment, and the kernel
frees the former one with all its entries. Most specific first is what a trie does by itself; that
an exclusion counts for all it covers is seen to here: an inclusion within it is left out.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Final, Self

from .interface import Pod, Stage, Step, step
from .kernel_objects import Map, MapType
from .node_pins import existing_map, node_map
from .options import CaptureOptions
from .selection import ANYWHERE, CHOICES, EVERYTHING, Cidr, PortRange, Selection, covers, in_order

NAME: Final = "selections"
DIRECTIONS: Final = ("outbound", "inbound")
_OF_PORT, _OF_IPV4, _OF_IPV6 = 0, 4, 6
_KIND_BITS: Final = 32
_PORT_BITS: Final = 16
_TRIE: Final = (24, 1)  # bytes of a key and of a value
_MOST_ENTRIES: Final = 1 << 17
_NO_PREALLOC: Final = 1  # BPF_F_NO_PREALLOC, which a trie has to have


def entries(selection: Selection) -> Iterator[tuple[bytes, bytes]]:
    """The trie of a selection: packed `struct selector`, and whether it excludes."""
    for ports in selection.excluded_ports():
        for first, bits in _prefixes(ports):
            yield _selector(_OF_PORT, bits, first.to_bytes(2, "big")), b"\1"
    if selection.include_cidrs:
        yield _selector(_OF_IPV4, 0, b""), b"\1"
        yield _selector(_OF_IPV6, 0, b""), b"\1"
    excluded = set(selection.exclude_cidrs)
    last: Cidr | None = None
    for cidr in in_order(excluded.union(selection.include_cidrs)):
        if cidr in excluded:
            last = cidr
        elif last is not None and covers(last, cidr):
            continue
        kind = _OF_IPV4 if cidr.version == 4 else _OF_IPV6
        selector = _selector(kind, cidr.prefixlen, cidr.network_address.packed)
        yield selector, bytes([cidr in excluded])


def _selector(kind: int, bits: int, value: bytes) -> bytes:
    return struct.pack("=II16s", _KIND_BITS + bits, kind, value)


def _prefixes(ports: PortRange) -> Iterator[tuple[int, int]]:
    """The range as aligned blocks: their first port, and how many bits of it they share."""
    first = ports.first
    while first <= ports.last:
        size = first & -first or 1 << _PORT_BITS
        while first + size - 1 > ports.last:
            size >>= 1
        yield first, _PORT_BITS + 1 - size.bit_length()
        first += size


@step
@dataclass(frozen=True, slots=True)
class SelectionEntry:
    """The selection of one direction; `lists` are its `texts`.

    `trie` is the id of the map that `apply` made.
    """

    kind: ClassVar[str] = "bpf-selection"
    stage: ClassVar[Stage] = Stage.APPLY

    bpffs: str
    cookie: int
    direction: str
    lists: tuple[str, ...]
    trie: int = field(default=0, compare=False)

    def describe(self) -> str:
        chosen = zip(CHOICES, self.lists, strict=True)
        words = "; ".join(f"{name.replace('_', ' ')} {text}" for name, text in chosen if text)
        return f"bpf map {NAME} += {self.direction}: {words}"

    def apply(self, pod: Pod) -> Self:  # noqa: ARG002 - the entry is found by its key alone
        with existing_map(self.bpffs, NAME) as selections, self._filled() as trie:
            selections.put(self._key(), struct.pack("=I", trie.fd))
            return dataclasses.replace(self, trie=trie.identifier)

    def takes_over(self, earlier: Step) -> bool:
        """Applying this one is enough to end another selection of the same direction."""
        place = (self.bpffs, self.cookie, self.direction)
        return isinstance(earlier, SelectionEntry) and place == (
            (earlier.bpffs, earlier.cookie, earlier.direction)
        )

    def undo(self, pod: Pod) -> None:  # noqa: ARG002 - the entry is found by its key alone
        selections = node_map(self.bpffs, NAME)
        if selections is not None:
            with selections:
                selections.delete(self._key())

    def missing(self, pod: Pod) -> str | None:  # noqa: ARG002 - as above
        selections = node_map(self.bpffs, NAME)
        if selections is None:
            return f"the BPF map {NAME} is gone"
        with selections:
            found = selections.get(self._key())
        return None if found == struct.pack("=I", self.trie) else f"not in the BPF map {NAME}"

    def _filled(self) -> Map:
        """A trie with all entries, known by nobody yet."""
        trie = Map.create(MapType.LPM_TRIE, "selection", _TRIE, _MOST_ENTRIES, _NO_PREALLOC)
        try:
            chosen = dict(zip(CHOICES, self.lists, strict=True))
            trie.put_all(entries(Selection.from_json(chosen)))
        except BaseException:
            trie.close()
            raise
        return trie

    def _key(self) -> bytes:
        return struct.pack("=QQ", self.cookie, DIRECTIONS.index(self.direction))


def selection_entries(bpffs: str, cookie: int, options: CaptureOptions) -> list[SelectionEntry]:
    """What the options of a pod need here: nothing for a direction that is captured whole."""
    inbound = Selection(exclude_cidrs=ANYWHERE) if options.bypass_inbound else options.inbound
    chosen = {"outbound": options.outbound, "inbound": inbound}
    return [
        SelectionEntry(bpffs, cookie, direction, selection.texts())
        for direction, selection in chosen.items()
        if selection != EVERYTHING
    ]
