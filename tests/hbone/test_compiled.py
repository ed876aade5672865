"""`make test COMPILED=1` tests what mypyc has built, `make test` the source."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyambient.engine.tunnel
import pyambient.hbone.frames
import pyambient.proxy.outbound

_IS_COMPILED = Path(__file__).parents[2].name == "compiled"


@pytest.mark.parametrize(
    "module",
    [pyambient.hbone.frames, pyambient.engine.tunnel, pyambient.proxy.outbound],
    ids=lambda module: module.__name__,
)
def test_what_is_tested_is_what_was_asked_for(module):
    assert module.__file__.endswith(".so" if _IS_COMPILED else ".py")
