"""What an operator chooses for one pod's interception: given at enrolment, kept in its record."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from pyambient.errors import UsageError

from .selection import EVERYTHING, Selection

# A name that the kernel takes (15 characters), and that no list or rule reads in another way.
_DEVICE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
_MOST_DEVICES: Final = 16
# What becomes of connections from before an enrolment.
KEEP: Final = "keep"
CLOSE: Final = "close"
GUARD_MODES: Final = ("drop", "count", "off")


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """The choices of one pod, each with what holds if nothing is said.

    `dns`: what its apps ask on port 53 goes to the proxy. `outbound` and `inbound`: which of its
    TCP connections are captured. `bypass_inbound`: none that comes in is, HBONE apart (Istio's
    annotation ambient.istio.io/bypass-inbound-capture). `virtual_interfaces`: devices, with commas
    between them, whose traffic is that of others behind the pod, and captured as outbound (Istio's
    istio.io/reroute-virtual-interfaces). `guard`: what becomes of TCP that leaves the pod past the
    proxy, one of GUARD_MODES; `guard_node`: the node has a look as well.
    """

    dns: bool = True
    outbound: Selection = EVERYTHING
    inbound: Selection = EVERYTHING
    bypass_inbound: bool = False
    virtual_interfaces: str = ""
    guard: str = "drop"
    guard_node: bool = False

    @property
    def devices(self) -> tuple[str, ...]:
        """The virtual interfaces, each by its name."""
        return tuple(filter(None, self.virtual_interfaces.split(",")))

    def in_words(self) -> list[str]:
        """For people, a line for each choice that differs from what holds by itself."""
        lines = [f"{name} {chosen}" for name, chosen in self._selections() if chosen != EVERYTHING]
        if self.virtual_interfaces:
            lines.append(f"outbound what comes in by {self.virtual_interfaces}")
        if (self.guard, self.guard_node) != (DEFAULTS.guard, DEFAULTS.guard_node):
            lines.append(f"guard {self.guard}{', also on the node' if self.guard_node else ''}")
        return lines

    def _selections(self) -> Iterator[tuple[str, Selection | str]]:
        yield "outbound", self.outbound
        yield "inbound", "nothing but HBONE" if self.bypass_inbound else self.inbound

    def to_json(self) -> dict[str, Any]:
        """The choices as JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {n: v.to_json() if isinstance(v, Selection) else v for n, v in values.items()}

    def changed(self, fields: Mapping[str, Any]) -> Self:
        """These choices, some of them replaced by JSON values; UsageError names what is none.

        Of a selection just the lists that are named are replaced.
        """
        known = {field.name: type(field.default) for field in dataclasses.fields(self)}
        values: dict[str, Any] = {}
        for name, value in fields.items():
            if name not in known:
                raise UsageError(f"{name!r} is no choice of an enrolment", "upgrade pyambient")
            if known[name] is Selection and isinstance(value, dict):
                values[name] = Selection.from_json({**getattr(self, name).to_json(), **value})
            elif type(value) is known[name]:
                values[name] = value
            else:
                raise UsageError(f"{name} cannot be {value!r}")
        made = dataclasses.replace(self, **values)
        _refuse_odd_devices(made.devices)
        _refuse_odd_guards(made)
        return made

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The choices in a request or a record; UsageError names what is none."""
        return cls().changed(fields)


def _refuse_odd_devices(names: tuple[str, ...]) -> None:
    for name in names:
        if name == "lo" or not _DEVICE.fullmatch(name):
            raise UsageError(f"{name!r} is no virtual interface", "give names of 'ip link'")
    if len(names) > _MOST_DEVICES:
        raise UsageError(f"{len(names)} interfaces are too many", f"give at most {_MOST_DEVICES}")


def _refuse_odd_guards(options: CaptureOptions) -> None:
    if options.guard not in GUARD_MODES:
        raise UsageError(
            f"guard cannot be {options.guard!r}", f"give one of {' '.join(GUARD_MODES)}"
        )
    if options.guard_node and options.guard == "off":
        raise UsageError(
            "the guard on the node knows packets by the pod's own guard, which is off",
            "give --guard drop or --guard count, or leave out --guard-node",
        )


DEFAULTS: Final = CaptureOptions()
