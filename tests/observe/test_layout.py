"""Lines in both layouts, and what hostile values can do to them: nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from pyambient.errors import UsageError
from pyambient.model.address import HostPort, SocketAddress
from pyambient.model.spiffe import SpiffeId
from pyambient.observe import layout
from pyambient.observe.layout import MAX_VALUE, bare, json_line, json_string, plain_line, quote

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


def test_timestamp() -> None:
    """UTC with six digits of a second and a Z, as ztunnel writes it."""
    assert RFC3339.fullmatch(layout.timestamp())


def test_plain_line() -> None:
    """Time, level, scope and message between tabs; fields between spaces."""
    fields = {
        "pod": "default/client",
        "count": 3,
        "share": 0.5,
        "ready": True,
        "drained": False,
        "peer": SocketAddress("fd00::2", 15008),
        "target": HostPort("server.default.svc", 80),
        "identity": SpiffeId("cluster.local", "default", "client"),
        "reason": None,
    }
    stamp, rest = plain_line("info", "proxy::inbound", "pod added", fields).split("\t", 1)
    assert RFC3339.fullmatch(stamp)
    assert rest == (
        'info\tproxy::inbound\tpod added\tpod="default/client" count=3 share=0.5 ready=true '
        "drained=false peer=[fd00::2]:15008 target=server.default.svc:80 "
        'identity="spiffe://cluster.local/ns/default/sa/client" reason="None"'
    )


def test_plain_line_without_fields() -> None:
    """The tab after the message stays, as in ztunnel's lines."""
    assert plain_line("warn", "mesh", "reloaded", {}).endswith("\twarn\tmesh\treloaded\t")


def test_json_line() -> None:
    """One object: level, time, scope, message, then the fields with their types."""
    fields = {"count": 3, "ready": True, "peer": SocketAddress("10.0.0.1", 80)}
    line = json_line("info", "agent", 'say "hi"', fields)
    found = json.loads(line)
    assert list(found) == ["level", "time", "scope", "message", "count", "ready", "peer"]
    assert RFC3339.fullmatch(found.pop("time"))
    assert found == {
        "level": "info",
        "scope": "agent",
        "message": 'say "hi"',
        "count": 3,
        "ready": True,
        "peer": "10.0.0.1:80",
    }


def test_json_fields_cannot_pose_as_the_head() -> None:
    """A field named `level` does not overwrite the line's level."""
    found = json.loads(json_line("info", "agent", "x", {"level": "error", "time": "never"}))
    assert found["level"] == "info"
    assert found["time"] != "never"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain", '"plain"'),
        ("", '""'),
        ("with space", '"with space"'),
        ("naïve ☃", '"naïve ☃"'),
        ('a"b', r'"a\"b"'),
        ("a\\b", r'"a\\b"'),
        ("a\nb", r'"a\nb"'),
        ("a\r\nb\tc", r'"a\r\nb\tc"'),
        ("\0", r'"\0"'),
        ("\x1b[2J", r'"\u{1b}[2J"'),
        ("\x7f\x85", r'"\u{7f}\u{85}"'),
        ("\u2028\u202e", r'"\u{2028}\u{202e}"'),
        ("\udc80", r'"\u{dc80}"'),
        ('x" level="info', r'"x\" level=\"info"'),
    ],
)
def test_quote(text: str, escaped: str) -> None:
    """What is printable stays; all else is written as Rust's debug format writes it."""
    assert quote(text) == escaped


@pytest.mark.parametrize("text", ["10.0.0.1:80", "[fd00::1%2]:80", "svc.ns.svc.cluster.local:80"])
def test_bare_address(text: str) -> None:
    """An address or authority needs no quotes."""
    assert bare(text) == text


@pytest.mark.parametrize("text", ["", "a b:80", "a\tb", "a\n2026", 'a"b', "a=b", "é:80", "a,b"])
def test_bare_is_quoted_when_it_is_no_address(text: str) -> None:
    """An authority that could pose as another field gets quotes."""
    assert bare(text) == quote(text)
    assert bare(text).startswith('"')


@pytest.mark.parametrize("render", [quote, bare, json_string])
def test_long_values_are_clipped(render: Callable[[str], str]) -> None:
    """A peer's megabyte does not become a megabyte of log."""
    rendered = render("a" * 1_000_000)
    assert len(rendered) < MAX_VALUE + 10
    assert rendered.startswith('"aaaa')


@pytest.mark.parametrize("hostile", ["a\nb", "a\r\nb", "a\x0bb", "a\x85b", "a\u2028b"])
@pytest.mark.parametrize("render", [plain_line, json_line])
def test_one_line_stays_one_line(hostile: str, render: layout.Layout) -> None:
    """Nothing in a message or a value starts another line."""
    line = render("info", "mesh", hostile, {"value": hostile, "other": 1})
    assert len(line.splitlines()) == 1


def test_message_keeps_its_quotes() -> None:
    """A message is our own text and stands as it is, but for what would break the layout."""
    line = plain_line("info", "mesh", 'no "x"\there\x1b', {})
    assert line.split("\t")[3] == r'no "x"\there\u{1b}'


def test_unknown_names() -> None:
    """A format or level of another name is a one-line error with the right ones."""
    with pytest.raises(UsageError, match="no log format 'xml'; use plain or json"):
        layout.layout_of("xml")
    with pytest.raises(UsageError, match="no log level 'loud'; use debug, info, warn, error"):
        layout.level_number("loud")
