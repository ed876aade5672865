"""The options that say what of a pod's traffic is captured, for `enroll` and `set` alike."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from pyambient.errors import UsageError
from pyambient.intercept.options import GUARD_MODES

_F = TypeVar("_F", bound=Callable[..., Any])
_MOST_BYTES: Final = 1 << 20
_WHAT: Final = {
    ("outbound", "ports"): "Destination ports",
    ("outbound", "cidrs"): "Destinations",
    ("inbound", "ports"): "Own ports",
    ("inbound", "cidrs"): "Clients",
}


def capture_options(function: _F) -> _F:
    """Give a command `options`: what was chosen, as `CaptureOptions.changed` takes it."""

    @functools.wraps(function)
    def command(*args: Any, **given: Any) -> Any:
        chosen: dict[str, Any] = {}
        for direction, verb, things in _LISTS:
            text = given.pop(f"{verb}_{direction}_{things}")
            if text is not None:
                chosen.setdefault(direction, {})[f"{verb}_{things}"] = _contents(text)
        for name in _SINGLE:
            value = given.pop(name)
            if value is not None:
                chosen[name] = value
        return function(*args, options=chosen, **given)

    wrapped: Any = command
    for option in (*_SINGLE.values(), *reversed(list(map(_list_option, _LISTS)))):
        wrapped = option(wrapped)
    result: _F = wrapped
    return result


# What is excluded first: that is what most look for.
_LISTS: Final = [
    (direction, verb, things)
    for direction in ("outbound", "inbound")
    for verb in ("exclude", "include")
    for things in ("ports", "cidrs")
]
_SINGLE: Final = {
    "virtual_interfaces": click.option(
        "--reroute-virtual-interfaces",
        "virtual_interfaces",
        metavar="DEVICES",
        help="Devices whose incoming traffic is captured as outbound.",
    ),
    "bypass_inbound": click.option(
        "--bypass-inbound-capture/--no-bypass-inbound-capture",
        "bypass_inbound",
        default=None,
        help="Capture nothing that comes in; HBONE still does.",
    ),
    "guard": click.option(
        "--guard",
        type=click.Choice(GUARD_MODES),
        help="What becomes of TCP and DNS past the proxy; backends bpf and tc.  [default: drop]",
    ),
    "guard_node": click.option(
        "--guard-node/--no-guard-node",
        "guard_node",
        default=None,
        help="Guard the node's end of the pod's veth as well.",
    ),
}


def _list_option(which: tuple[str, str, str]) -> Callable[[_F], _F]:
    direction, verb, things = which
    what = _WHAT[direction, things]
    says = f"{what} that are not" if verb == "exclude" else f"The only {what.lower()} that are"
    return click.option(
        f"--{verb}-{direction}-{things}", metavar=things.upper(), help=f"{says} captured."
    )


def _contents(text: str) -> str:
    """The list itself; of @FILE what is in there, a line or a comma between two items.

    The kernel takes 128 KiB for one argument (execve(2)), which is less than 10,000 CIDRs.
    """
    if not text.startswith("@"):
        return text
    try:
        with Path(text[1:]).open(encoding="utf-8") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UsageError(f"cannot read {text[1:]}: {reason}") from None
    if len(content) > _MOST_BYTES:
        raise UsageError(f"{text[1:]} is longer than {_MOST_BYTES} characters")
    return ",".join(re.split(r"[\s,]+", content.strip()))
