"""YAML with its positions kept, and small readers that make values of it.

General theory of operation
---------------------------
PyYAML composes a file to nodes that know their line; nothing is ever constructed from a tag. A
`Spot` is a node and the way to it, so that every complaint can name file, line and key. A reader
is a function from a spot to a value, and readers are put together from readers (`list_of`,
`map_of`, `record`), which makes a file format a table: see `localschema`.

A reader follows its own shape, never the file's, so its depth is bounded; what aliases can blow up
is its work, which is bounded by counting the values read.

Plain scalars have the types of YAML 1.2's core schema, as in ztunnel: `no` and `1:30` are text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import yaml

from pyambient.errors import UsageError

_T = TypeVar("_T")
_K = TypeVar("_K")
Reader = Callable[["Spot"], _T]

_MAX_VALUES = 2_000_000
_SHOWN = 300
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = re.compile(r"0|[1-9][0-9]*")
_CORE_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "seq", "map", "timestamp", "merge", "value")
)
_CORE_TYPES = (
    ("nothing", re.compile(r"~|null|Null|NULL|")),
    ("true or false", re.compile(r"true|True|TRUE|false|False|FALSE")),
    (
        "a number",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|0[ox][0-9A-Fa-f]+"),
    ),
    ("a number", re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")),
)


class MeshFileError(UsageError):
    """A mesh file that cannot be used; one line that names file, line and key."""


@dataclass(slots=True)
class _Document:
    """The file that is being read, and how much of it has been."""

    name: str
    values: int = 0


def _complaint(name: str, line: int, what: str, then: str) -> MeshFileError:
    """The one line; what it quotes from the file can neither break nor flood it."""
    shown = "".join(c if c.isprintable() else "?" for c in what[:_SHOWN])
    return MeshFileError(f"{name}:{line}: {shown}", then)


class Spot:
    """A node of the file and the way to it."""

    __slots__ = ("_document", "_parent", "_step", "node")

    def __init__(
        self, document: _Document, node: yaml.Node, parent: Spot | None = None, step: str = ""
    ) -> None:
        self.node = node
        self._document = document
        self._parent = parent
        self._step = step
        document.values += 1
        if document.values > _MAX_VALUES:
            raise self.error(
                f"more than {_MAX_VALUES} values", "split the mesh or use fewer aliases"
            )

    @property
    def line(self) -> int:
        """Counted from 1."""
        return int(self.node.start_mark.line) + 1

    @property
    def path(self) -> str:
        """The way from the root, as in `workloads[2].services`."""
        before = self._parent.path if self._parent else ""
        return before + self._step if before else self._step.removeprefix(".")

    def error(self, what: str, then: str) -> MeshFileError:
        """The one line about this spot."""
        subject = f"key '{self.path}': " if self.path else ""
        return _complaint(self._document.name, self.line, subject + what, then)

    def child(self, node: yaml.Node, step: str) -> Spot:
        return Spot(self._document, node, self, step)

    def kind(self) -> str:
        """What stands here, in words."""
        node = self.node
        if node.tag not in _CORE_TAGS:
            return f"a value tagged {node.tag}"
        if isinstance(node, yaml.MappingNode):
            return "a mapping"
        if isinstance(node, yaml.SequenceNode):
            return "a list"
        if isinstance(node, yaml.ScalarNode) and not node.style:
            for name, pattern in _CORE_TYPES:
                if pattern.fullmatch(node.value):
                    return name
        return "text"

    def must_be(self, wanted: str, then: str) -> None:
        found = self.kind()
        if found != wanted:
            raise self.error(f"is {found}, not {wanted}", then)

    def items(self) -> Iterator[tuple[str, Spot, Spot]]:
        """The keys of a mapping as text and as spots, and their values; each key once."""
        self.must_be("a mapping", "write it as 'key: value' lines")
        seen: dict[str, int] = {}
        for key_node, value_node in self.node.value:
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            key, value = self.child(key_node, f".{name}"), self.child(value_node, f".{name}")
            if name in seen:
                raise key.error(
                    f"stands twice, first on line {seen[name]}", "remove one of the two"
                )
            seen[name] = key.line
            yield name, key, value

    def elements(self) -> Iterator[Spot]:
        self.must_be("a list", "write it as lines that start with '- ', or as []")
        for index, node in enumerate(self.node.value):
            yield self.child(node, f"[{index}]")


def compose(source: str, name: str) -> Spot:
    """The root of the one document in `source`; MeshFileError for a syntax error or no content."""
    then = "correct the YAML"
    try:
        root = yaml.compose(source, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise _complaint(name, line, str(error.problem or error.context), then) from None
    except yaml.reader.ReaderError as error:
        line = source.encode().count(b"\n", 0, error.position) + 1
        raise _complaint(name, line, error.reason, then) from None
    except RecursionError:
        raise _complaint(name, 1, "too deeply nested", then) from None
    if root is None:
        raise _complaint(name, 1, "the file is empty", "write {} for a mesh with nothing in it")
    return Spot(_Document(name), root)


def text(spot: Spot) -> str:
    spot.must_be("text", "write text, in quotes if it looks like something else")
    return str(spot.node.value)


def boolean(spot: Spot) -> bool:
    spot.must_be("true or false", "write true or false")
    return str(spot.node.value).lower() == "true"


def number(low: int, high: int) -> Reader[int]:
    """A whole decimal number from `low` to `high`."""
    then = f"write a whole number from {low} to {high}"

    def read(spot: Spot) -> int:
        spot.must_be("a number", then)
        return _in_range(spot, low, high, then)

    return read


def number_key(low: int, high: int) -> Reader[int]:
    """As `number`, and in quotes too: JSON has no other keys."""
    then = f"write a whole number from {low} to {high}"

    def read(spot: Spot) -> int:
        if spot.kind() not in ("a number", "text"):
            spot.must_be("a number", then)
        return _in_range(spot, low, high, then)

    return read


def _in_range(spot: Spot, low: int, high: int, then: str) -> int:
    digits = spot.node.value
    if _NUMBER.fullmatch(digits) and len(digits) < 12 and low <= int(digits) <= high:
        return int(digits)
    raise spot.error(f"{digits!r} does not fit", then)


def parsed(parse: Callable[[str], _T], then: str) -> Reader[_T]:
    """Text that `parse` makes a value of; its ValueError says what is wrong with it."""

    def read(spot: Spot) -> _T:
        try:
            return parse(text(spot))
        except ValueError as error:
            raise spot.error(str(error), then) from None

    return read


def matching(pattern: str, what: str) -> Reader[str]:
    """Text of a form that `what` describes."""
    shape = re.compile(pattern)

    def read(spot: Spot) -> str:
        found = text(spot)
        if shape.fullmatch(found) is None:
            raise spot.error(f"{found!r} is not {what}", f"write {what}")
        return found

    return read


def choice(values: Mapping[str, _T]) -> Reader[_T]:
    """One of a few words, each with its value."""
    then = f"write one of {', '.join(values)}"

    def read(spot: Spot) -> _T:
        found = text(spot)
        if found not in values:
            raise spot.error(f"{found!r} is not known here", then)
        return values[found]

    return read


def list_of(read: Reader[_T], unique: Callable[[_T], str] | None = None) -> Reader[tuple[_T, ...]]:
    """A list as a tuple; with `unique`, no two elements may have the same such key."""

    def read_list(spot: Spot) -> tuple[_T, ...]:
        lines: dict[str, int] = {}
        values = []
        for element in spot.elements():
            value = read(element)
            if unique is not None:
                _once(element, unique(value), lines)
            values.append(value)
        return tuple(values)

    return read_list


def _once(element: Spot, key: str, lines: dict[str, int]) -> None:
    if key in lines:
        raise element.error(
            f"{key} is on line {lines[key]} already", "rename or remove one of the two"
        )
    lines[key] = element.line


def map_of(read_key: Reader[_K], read_value: Reader[_T]) -> Reader[Mapping[_K, _T]]:
    """A mapping whose keys are data."""

    def read(spot: Spot) -> Mapping[_K, _T]:
        return MappingProxyType({read_key(k): read_value(v) for _, k, v in spot.items()})

    return read


def tagged(readers: Mapping[str, Reader[_T]], then: str) -> Reader[_T]:
    """A value whose tag says how to read it."""

    def read(spot: Spot) -> _T:
        reader = readers.get(spot.node.tag)
        if reader is None:
            raise spot.error(f"is {spot.kind()}, without a tag of {', '.join(readers)}", then)
        return reader(spot)

    return read


@dataclass(frozen=True, slots=True)
class Field(Generic[_T]):
    """A key of a record: the argument it becomes, and its reader.

    Without an argument's name ("") the value is checked and dropped. The default stands in for a
    key that is not there; None leaves that to the function that builds the record.
    """

    argument: str
    read: Reader[_T]
    required: bool = False
    default: _T | None = None


def record(build: Callable[..., _T], fields: Mapping[str, Field[Any]]) -> Reader[_T]:
    """A mapping with known keys, as `build(argument=value, ...)`.

    A key that is not there leaves its argument out, unless its field has a default. A ValueError
    of `build` is a complaint about the mapping as a whole.
    """
    defaults: dict[str, Any] = {
        f.argument: f.default for f in fields.values() if f.default is not None
    }

    def read(spot: Spot) -> _T:
        arguments = dict(defaults)
        missing = {key for key, f in fields.items() if f.required}
        for name, key, value in spot.items():
            known = fields.get(name)
            if known is None:
                raise key.error("is not a key of this format", _known_keys(name, fields))
            arguments[known.argument] = known.read(value)
            missing.discard(name)
        if missing:
            name = min(missing)
            raise spot.child(spot.node, f".{name}").error("is missing", "add it")
        return _built(spot, build, arguments)

    return read


def _built(spot: Spot, build: Callable[..., _T], arguments: Mapping[str, Any]) -> _T:
    try:
        return build(**{name: value for name, value in arguments.items() if name})
    except ValueError as error:
        raise spot.error(str(error), "correct it") from None


def _known_keys(name: str, fields: Mapping[str, Field[Any]]) -> str:
    similar = difflib.get_close_matches(name, fields, n=1)
    if similar:
        return f"did you mean {similar[0]!r}?"
    return f"the keys here are {', '.join(fields)}"
