"""What an operator chooses for one pod's interception: given at enrolment, kept in its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from pyambient.errors import UsageError


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """The choices of one pod, each with what holds if nothing is said.

    `dns`: what its apps ask on port 53 goes to the proxy.
    """

    dns: bool = True

    def to_json(self) -> dict[str, Any]:
        """The choices as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The choices in a request or a record; UsageError names what is none."""
        known = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        for name, value in fields.items():
            if name not in known:
                raise UsageError(f"{name!r} is no choice of an enrolment", "upgrade pyambient")
            if type(value) is not known[name]:
                raise UsageError(f"{name} cannot be {value!r}")
        return cls(**fields)


DEFAULTS: Final = CaptureOptions()
