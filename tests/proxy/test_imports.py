"""What a proxy process loads: its memory is the base that every node pays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyambient.bench.processes import resident_bytes
from tests.bed import CgroupTree
from tests.bed.patience import patience

# Tens of megabytes that only the agent and the command line need.
FOREIGN = ("pyroute2.", "rich.", "click.")
MAX_RSS = 60 << 20
_HEADER = "imported package"


@pytest.fixture
def proxy(cgroup_tree: CgroupTree, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`pyambient proxy` once it is ready, and what it has imported until then."""
    line = [sys.executable, "-m", "pyambient", "proxy", f"--run-dir={tmp_path}"]
    process = subprocess.Popen(
        [*line, f"--cgroup={cgroup_tree.path}"],
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    try:
        for one in process.stderr:
            said.append(one)
            if "proxy ready" in one:
                break
        # The command line has imported its own share before it became the proxy.
        last = max(i for i, one in enumerate(said) if _HEADER in one)
        yield process, "".join(said[last:])
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=patience(20))


def test_a_worker_never_imports_pyroute2_rich_or_click(
    proxy: tuple[subprocess.Popen[str], str],
) -> None:
    """Neither to start nor to log, whatever its libraries would like to have."""
    _, imports = proxy
    lines = [line for line in imports.splitlines() if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip() for line in lines}
    assert "pyambient.proxy.main" in modules
    # An import that was refused is listed as well, but then nothing of the package is.
    assert {name for name in modules if name.startswith(FOREIGN)} == set()


def test_a_worker_takes_at_most_60_mb(proxy: tuple[subprocess.Popen[str], str]) -> None:
    """Resident, libraries and all, before it has a pod."""
    process, _ = proxy
    assert resident_bytes(process.pid) <= MAX_RSS
