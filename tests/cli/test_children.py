"""Processes that pyambient starts of itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pyambient.children import module


def test_nothing_is_imported_from_the_folder_where_one_happens_to_be(tmp_path: Path) -> None:
    """It may be /tmp, and the file anybody's: it would run as root."""
    (tmp_path / "trio.py").write_text("raise SystemExit('imported')")
    subprocess.run(module("pyambient", "--help"), cwd=tmp_path, check=True, capture_output=True)
