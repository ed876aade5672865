r"""One log line, in ztunnel's two layouts.

Plain is `<time>\t<level>\t<scope>\t<message>\t<k=v k="str" ...>`; JSON is an object with level,
time, scope, message and then the fields. Names, authorities and error texts come from apps and
peers, so every value is escaped as Rust's `{:?}` does it: a line stays one line, a quote stays
inside its quotes, and a terminal gets no control characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from pyambient.errors import UsageError
from pyambient.model.address import HostPort, SocketAddress

Layout = Callable[[str, str, str, Mapping[str, Any]], str]
"""Renders (level, scope, message, fields) as a line without its newline."""

LEVELS: Mapping[str, int] = {"debug": 10, "info": 20, "warn": 30, "error": 40}
"""ztunnel's level names, and the numbers they are ordered by."""

# The longest value that a line holds in full: room for a traceback, none for a flood.
MAX_VALUE = 8192

_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\0": "\\0", '"': '\\"', "\\": "\\\\"}
_BARE = re.compile(r"[A-Za-z0-9._:%\[\]-]+")
_encode = json.JSONEncoder(separators=(",", ":")).encode


def level_number(level: str) -> int:
    """The number of a level's name; UsageError if there is none."""
    try:
        return LEVELS[level]
    except KeyError:
        raise UsageError(f"there is no log level {level!r}", f"use {', '.join(LEVELS)}") from None


def layout_of(log_format: str) -> Layout:
    """The layout called `plain` or `json`; UsageError for any other name."""
    try:
        return {"plain": plain_line, "json": json_line}[log_format]
    except KeyError:
        raise UsageError(f"there is no log format {log_format!r}", "use plain or json") from None


def plain_line(level: str, scope: str, message: str, fields: Mapping[str, Any]) -> str:
    rendered = " ".join(f"{key}={_plain_value(value)}" for key, value in fields.items())
    return f"{timestamp()}\t{level}\t{scope}\t{_one_line(clip(message))}\t{rendered}"


def json_line(level: str, scope: str, message: str, fields: Mapping[str, Any]) -> str:
    """An object in ASCII; a field cannot take the name of one of the first four."""
    head = {"level": level, "time": timestamp(), "scope": scope, "message": clip(message)}
    rest = {key: _json_value(value) for key, value in fields.items() if key not in head}
    return _encode(head | rest)


def timestamp(at: datetime | None = None) -> str:
    """A moment, or now, as RFC 3339 with microseconds and a Z."""
    return (at or datetime.now(UTC)).isoformat(timespec="microseconds")[:26] + "Z"


def clip(text: str) -> str:
    """`text`, or its beginning and an ellipsis if it is longer than a value may be."""
    return text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + "…"


def quote(text: str) -> str:
    """`text` clipped, escaped and in double quotes."""
    if len(text) > MAX_VALUE:
        text = clip(text)
    if not text.isprintable() or '"' in text or "\\" in text:
        text = "".join(map(_escape, text))
    return f'"{text}"'


def bare(text: str) -> str:
    """An address or authority: without quotes as long as it looks like one."""
    return text if len(text) <= MAX_VALUE and _BARE.fullmatch(text) else quote(text)


def json_string(text: str) -> str:
    """`text` clipped, as a JSON string in ASCII."""
    return _encode(clip(text))


def _escape(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    return character if character.isprintable() else f"\\u{{{ord(character):x}}}"


def _one_line(message: str) -> str:
    """A message stands without quotes, so quotes in it may stay; what breaks the line may not."""
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else _escape(c) for c in message)


def _plain_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, (SocketAddress, HostPort)):
        return bare(str(value))
    return quote(str(value))


def _json_value(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float)) else clip(str(value))
