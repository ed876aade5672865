"""The rules of `netfilter` in nft's JSON (libnftables-json(5)), and that JSON as text for people.

The JSON is what is recorded and loaded. Each rule carries its `why` as a comment: the kernel keeps
it with the rule, and that is how a rule is known again. Its expressions would not do, because every
version of nft compiles them in a way of its own.
"""

from __future__ import annotations

import functools
import json
from typing import Any, Final

from pyambient.model.numbers import LOOPBACK_MARK, MARK_MASK
from pyambient.model.ports import WELL_KNOWN, Ports

from .netfilter import Action, Field, Match, Place, Rule, rules
from .options import CaptureOptions
from .selection import PortRange

TABLE: Final = "pyambient"


def _either(left: Any, right: str) -> Any:
    """Bits of both; older versions of nft take two operands and no more."""
    return {"|": [left, right]}


_MARK: Final = {"meta": {"key": "mark"}}
_CONNECTION_MARK: Final = {"ct": {"key": "mark"}}
_TCP_FLAGS: Final = {"payload": {"protocol": "tcp", "field": "flags"}}
_OPENING_OR_NOT: Final = functools.reduce(_either, ("syn", "rst", "ack"), "fin")
_BITS_OF_OTHERS: Final = 0xFFFFFFFF & ~MARK_MASK

_ADDRESSES: Final = {Field.SOURCE: "saddr", Field.DESTINATION: "daddr"}
_LEFT: Final = {
    Field.INPUT_DEVICE: {"meta": {"key": "iifname"}},
    Field.OUTPUT_DEVICE: {"meta": {"key": "oifname"}},
    Field.PROTOCOL: {"meta": {"key": "l4proto"}},
    Field.TCP_OPENING: {"&": [_TCP_FLAGS, _OPENING_OR_NOT]},
    Field.DESTINATION_PORT: {"payload": {"protocol": "tcp", "field": "dport"}},
    Field.UDP_SOURCE_PORT: {"payload": {"protocol": "udp", "field": "sport"}},
    Field.UDP_DESTINATION_PORT: {"payload": {"protocol": "udp", "field": "dport"}},
    Field.MARK: {"&": [_MARK, MARK_MASK]},
    Field.CONNECTION_MARK: {"&": [_CONNECTION_MARK, MARK_MASK]},
}

_VERDICTS: Final = {
    Action.ACCEPT: "accept",
    Action.DROP: "drop",
    Action.RETURN: "return",
    Action.NOT_TRACKED: "notrack",
}


def encode(
    family: str, place: Place, options: CaptureOptions, ports: Ports = WELL_KNOWN
) -> tuple[str, ...]:
    """The rules of a place, for its chain in our table of the family, "ip" or "ip6".

    Each is one JSON object.
    """
    where = {"family": family, "table": TABLE, "chain": place.value}
    return tuple(
        json.dumps({**where, "comment": rule.why, "expr": _parts(family, rule)})
        for rule in rules(place, options, ipv6=family == "ip6", ports=ports)
    )


def _parts(family: str, rule: Rule) -> list[dict[str, Any]]:
    return [*(_match(family, match) for match in rule.matches), _statement(rule)]


def _match(family: str, match: Match) -> dict[str, Any]:
    left: Any
    if match.field in _ADDRESSES:
        left = {"payload": {"protocol": family, "field": _ADDRESSES[match.field]}}
    else:
        left = _LEFT[match.field]
    right = "syn" if match.field is Field.TCP_OPENING else _right(match.value)
    return {"match": {"op": "!=" if match.negated else "==", "left": left, "right": right}}


def _right(value: Any) -> Any:
    """A value, or several as the set of this one rule: it comes and goes with the rule."""
    return {"set": list(map(_element, value))} if isinstance(value, tuple) else value


def _element(value: str | PortRange) -> Any:
    if isinstance(value, PortRange):
        return value.first if value.first == value.last else {"range": list(value)}
    address, _, bits = value.partition("/")
    return {"prefix": {"addr": address, "len": int(bits)}}


def _statement(rule: Rule) -> dict[str, Any]:
    match rule.action:
        case Action.REDIRECT:
            return {"redirect": {"port": rule.port}}
        case Action.NOTE_ON_CONNECTION:
            kept = {"&": [_CONNECTION_MARK, _BITS_OF_OTHERS]}
            return {"mangle": {"key": _CONNECTION_MARK, "value": {"|": [kept, LOOPBACK_MARK]}}}
        case Action.MARK_AS_CONNECTION:
            return {"mangle": {"key": _MARK, "value": _CONNECTION_MARK}}
    return {_VERDICTS[rule.action]: None}


def text(command: dict[str, Any]) -> str:
    """A command of ours in nft's own language (nft(8)), in a line."""
    ((verb, subject),) = command.items()
    ((kind, fields),) = subject.items()
    names = (fields.get(key, "") for key in ("family", "table", "chain", "name"))
    return " ".join(filter(None, (verb, kind, *names, _definition(kind, fields))))


def _definition(kind: str, fields: dict[str, Any]) -> str:
    if kind == "rule":
        return " ".join([*map(_part, fields["expr"]), f'comment "{fields["comment"]}"'])
    if "hook" in fields:
        return "{{ type {type} hook {hook} priority {prio}; }}".format(**fields)
    return ""


def _part(part: dict[str, Any]) -> str:
    """A match or a statement of a rule."""
    ((kind, inner),) = part.items()
    match kind:
        case "match":
            return _comparison(**inner)
        case "mangle":
            return f"{_expression(inner['key'])} set {_expression(inner['value'])}"
        case "redirect":
            return f"redirect to :{inner['port']}"
    return str(kind)


def _comparison(op: str, left: dict[str, Any], right: Any) -> str:
    """Masked values are in hexadecimal, as their masks are; == goes without saying elsewhere."""
    if "&" in left:
        return f"{_expression(left)} {op} {_expression(right)}"
    value = _expression(right) if isinstance(right, dict) else right
    return f"{_expression(left)} {value}" if op == "==" else f"{_expression(left)} {op} {value}"


def _value(element: Any) -> str:
    """An element of a set."""
    match element:
        case {"prefix": {"addr": address, "len": bits}}:
            return f"{address}/{bits}"
        case {"range": [first, last]}:
            return f"{first}-{last}"
    return str(element)


def _expression(expression: Any) -> str:
    if not isinstance(expression, dict):
        return f"{expression:#x}" if isinstance(expression, int) else str(expression)
    ((kind, inner),) = expression.items()
    if kind == "payload":
        return f"{inner['protocol']} {inner['field']}"
    if kind == "set":
        return f"{{ {', '.join(map(_value, inner))} }}"
    if kind in ("meta", "ct"):
        return f"{kind} {inner['key']}"
    left, right = map(_expression, inner)
    return f"{left} {kind} ({right})" if " " in right else f"{left} {kind} {right}"
