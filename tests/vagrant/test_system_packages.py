"""scripts/system-packages, which every `make` and every guest runs before anything else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "scripts/system-packages"
# As apt does, it refuses to run beside another; what it installs, dpkg-query then knows.
_APT_GET = """#!/bin/sh
mkdir "$STATE/running" || { echo 'E: Unable to lock directory' >&2; exit 100; }
sleep 0.2
echo "$1" >>"$STATE/asked"
[ "$1" = update ] || touch "$STATE/installed"
rmdir "$STATE/running"
"""
_DPKG_QUERY = """#!/bin/sh
[ -e "$STATE/installed" ] && printf installed
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name, text in (("apt-get", _APT_GET), ("dpkg-query", _DPKG_QUERY)):
        program = tmp_path / name
        program.write_text(text)
        program.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "STATE": str(tmp_path)}


def test_several_at_a_time_do_not_meet_at_apt(environment: dict[str, str], tmp_path: Path) -> None:
    """Two guests that start both find qemu missing; the second takes what the first installed."""
    runs = [
        subprocess.Popen([_SCRIPT, "qemu"], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [(run.communicate()[1], run.returncode) for run in runs] == [("", 0)] * 3
    assert (tmp_path / "asked").read_text().split() == ["update", "install"]
