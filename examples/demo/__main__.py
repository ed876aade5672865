"""The demo's command line, and the walls around it.

Two processes. The outer one makes a cgroup2 sub-tree and starts the inner one in network, mount
and process namespaces of its own; whatever happens in there, it removes the sub-tree at the end.
The inner one tells the story. So the machine keeps its own netns names, bpffs, routes and
firewall, and no process of the demo outlives it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from pyambient.errors import NeedsRoot, PyambientError

from . import story
from .cgroup import subtree

# The first word ends the rest if this process is killed.
_WALLS = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument(
        "--backend", choices=("auto", "bpf", "tc", "nftables", "iptables"), default="auto"
    )
    parser.add_argument(
        "--without-bpf", action="store_true", help="make bpf(2) fail, as on a kernel without it"
    )
    parser.add_argument("--inside", nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _apart(options: argparse.Namespace) -> int:
    """Run the story behind the walls; its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work = Path(tempfile.mkdtemp(prefix="pyambient-demo-"))
    # The apps run as nobody and have to reach their files in it.
    work.chmod(0o711)
    code = 0
    try:
        with subtree("pyambient-demo") as cgroup:
            code = _tell_inside(options, work, cgroup)
    finally:
        if code:
            sys.stderr.write(f"what the demo's programs wrote is kept in {work}\n")
        else:
            shutil.rmtree(work)
    return code


def _tell_inside(options: argparse.Namespace, work: Path, cgroup: Path) -> int:
    again = [sys.executable, "-m", "examples.demo", "--backend", options.backend]
    no_bpf = [sys.executable, "-m", "examples.demo.without_bpf"] if options.without_bpf else []
    command = [*no_bpf, *_WALLS, *again, "--inside", str(work), str(cgroup)]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    options = _options()
    try:
        if os.geteuid() != 0:
            raise NeedsRoot("the demo")
        if options.inside:
            work, cgroup = options.inside
            return story.tell(work, cgroup, options.backend)
        return _apart(options)
    except PyambientError as error:
        sys.stderr.write(f"demo: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
