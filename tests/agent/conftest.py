"""The rig, fresh for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bed import Bed

from .rig import Rig


@pytest.fixture
def rig(bed: Bed, tmp_path: Path) -> Rig:
    """A run directory with nobody in it yet."""
    return Rig(bed, tmp_path)
