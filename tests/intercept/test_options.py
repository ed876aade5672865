"""The choices of an enrolment as JSON values, and what is refused."""

from __future__ import annotations

import json

import pytest

from pyambient.errors import UsageError
from pyambient.intercept.options import CaptureOptions
from pyambient.intercept.selection import Selection


def test_a_record_keeps_every_choice() -> None:
    """What is written and read back is equal."""
    selection = Selection.from_json({"exclude_ports": "22", "include_cidrs": "10.0.0.0/8"})
    chosen = CaptureOptions(False, selection, selection, True, "tap0,vnet1")
    assert CaptureOptions.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen


def test_what_is_not_said_is_the_default() -> None:
    """An empty object is no error."""
    assert CaptureOptions.from_json({}) == CaptureOptions()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"colour": 1}, "'colour' is no choice"),
        ({"dns": "yes"}, "dns cannot be 'yes'"),
        ({"outbound": "22"}, "outbound cannot be '22'"),
        ({"outbound": {"exclude_ports": "ssh"}}, "'ssh' is no port"),
        ({"virtual_interfaces": "lo"}, "'lo' is no virtual interface"),
        ({"virtual_interfaces": "tap0,a b"}, "'a b' is no virtual interface"),
        ({"virtual_interfaces": "-j"}, "'-j' is no virtual interface"),
        ({"virtual_interfaces": ",".join(f"tap{n}" for n in range(17))}, "17 interfaces are too"),
    ],
)
def test_what_is_no_choice_is_refused(fields: dict[str, object], says: str) -> None:
    """By name, in one line."""
    with pytest.raises(UsageError, match=says):
        CaptureOptions.from_json(fields)


def test_a_change_keeps_what_it_does_not_name() -> None:
    """Of a selection, too: each list is a choice of its own."""
    before = CaptureOptions.from_json({"dns": False, "outbound": {"exclude_ports": "22"}})
    after = before.changed({"outbound": {"exclude_cidrs": "10.0.0.0/8"}, "bypass_inbound": True})
    assert after == CaptureOptions.from_json(
        {
            "dns": False,
            "outbound": {"exclude_ports": "22", "exclude_cidrs": "10.0.0.0/8"},
            "bypass_inbound": True,
        }
    )
    assert after.changed({"outbound": {"exclude_ports": ""}}).outbound.exclude_ports == ()
