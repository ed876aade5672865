"""What a proxy process loads: its memory is the base that every node pays."""

from __future__ import annotations

import subprocess
import sys

# Tens of megabytes that only the agent and the command line need.
FOREIGN = ("pyroute2", "rich", "click")
PROGRAM = f"""
import sys
import pyambient.proxy.main
from pyambient.observe.logs import configure, get_logger
configure("plain", "info", lambda line: None)
get_logger("test").info("a line")
found = [name for name in {FOREIGN!r} if name in sys.modules]
sys.exit(f"imported: {{found}}" if found else 0)
"""


def test_a_worker_never_imports_pyroute2_rich_or_click():
    """Neither to start nor to log, whatever its libraries would like to have."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
