"""The choices of an enrolment as JSON values, and what is refused."""

from __future__ import annotations

import json

import pytest

from pyambient.errors import UsageError
from pyambient.intercept.options import CaptureOptions


def test_a_record_keeps_every_choice() -> None:
    """What is written and read back is equal."""
    chosen = CaptureOptions(dns=False)
    assert CaptureOptions.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen


def test_what_is_not_said_is_the_default() -> None:
    """An empty object is no error."""
    assert CaptureOptions.from_json({}) == CaptureOptions()


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"colour": 1}, "'colour' is no choice"), ({"dns": "yes"}, "dns cannot be 'yes'")],
)
def test_what_is_no_choice_is_refused(fields: dict[str, object], says: str) -> None:
    """By name, in one line."""
    with pytest.raises(UsageError, match=says):
        CaptureOptions.from_json(fields)
