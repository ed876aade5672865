"""The byte path's small benchmarks: one tiny round for real."""

from __future__ import annotations

import subprocess
import sys

import pytest

PATIENCE = 110


@pytest.mark.parametrize(("bench", "figures"), [("splice", 4), ("loops", 7)])
def test_a_round_fills_every_row(isolated, tmp_path, bench, figures):
    """Each of the subjects has done all of the work, and none of it for nothing."""
    command = [sys.executable, "-m", f"pyambient.bench.engine.{bench}"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--seconds", "0.05"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, _, *rows = (line.strip("|").split("|") for line in done.stdout.splitlines())
    assert len(rows) == figures
    for row in rows:
        assert len(row) > 3
        assert all(float(cell.replace(",", "")) > 0 for cell in row[1:]), row
