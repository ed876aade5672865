"""Slices of the CPU are asked for without touching what else is set."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pyambient.engine.scheduling import SLICE

_PROGRAM = """
import json, os, sys
from pyambient.engine.scheduling import SLICE, shorten_slices, slice_length

nice = os.nice(int(sys.argv[1]))
print(json.dumps([slice_length(), shorten_slices(SLICE), slice_length(), os.nice(0) - nice]))
"""


@pytest.mark.parametrize("nicer_by", [0, 5])
def test_slices_get_short(nicer_by: int) -> None:
    """Where the kernel has slices of one's own, and tells their length; elsewhere all stays."""
    command = [sys.executable, "-c", _PROGRAM, str(nicer_by)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    before, taken, after, nicer = json.loads(done.stdout)

    assert taken
    assert after == (SLICE if before else before)
    assert not nicer
