"""Slices of the CPU are asked for without touching what else is set."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_PROGRAM = """
import json, os, re, sys
from pathlib import Path
from pyambient.engine.scheduling import shorten_slices

def slices():
    found = re.search(r"se\\.slice +: +(\\d+)", Path("/proc/self/sched").read_text())
    return found and int(found[1])

nice, before = os.nice(int(sys.argv[1])), slices()
print(json.dumps([before, shorten_slices(), slices(), os.nice(0) - nice]))
"""


_HAS_OWN_SLICES = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 12)


@pytest.mark.parametrize("nicer_by", [0, 5])
def test_slices_get_short(nicer_by: int) -> None:
    """To a tenth of a millisecond where the kernel lets be asked; elsewhere all stays as it was."""
    command = [sys.executable, "-c", _PROGRAM, str(nicer_by)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    before, taken, after, nicer = json.loads(done.stdout)

    assert taken
    assert after == (100_000 if _HAS_OWN_SLICES else before)
    assert not nicer
