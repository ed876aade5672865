"""A benchmark runs apart from the machine: namespaces and a cgroup2 sub-tree of its own.

Two processes. The outer one makes the sub-tree and starts the inner one in network, mount and
process namespaces of its own; whatever happens in there, it removes the sub-tree at the end. No
rule, route, pin or process of a benchmark outlives it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pyambient import children
from pyambient.errors import NeedsRoot, PyambientError
from pyambient.intercept.mounts import find_cgroup2_root

# The first words end the rest if this process is killed.
_WALLS = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
)
_INSIDE = "--inside"
_PATIENCE = 5.0
_FIRST = -20
_AUTOGROUP = Path("/proc/self/autogroup")


def run_apart(module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments --inside CGROUP` behind the walls; its exit code.

    SIGTERM ends it like Ctrl-C does, with nothing left.
    """
    if os.geteuid() != 0:
        raise NeedsRoot("the benchmark")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with _subtree() as cgroup:
        command = children.module(module, *arguments, _INSIDE, str(cgroup))
        return subprocess.run([*_WALLS, *command], check=False).returncode


def options_of(module: str, description: str | None, seconds: float) -> argparse.ArgumentParser:
    """The options of every benchmark that runs in rounds; `seconds` is their default length."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=seconds, help="of each measurement")
    parser.add_argument(_INSIDE, type=Path, help=argparse.SUPPRESS)
    return parser


def behind_walls(
    module: str, arguments: Sequence[str], inside: Path | None, work: Callable[[], int]
) -> int:
    """Exit code of a benchmark's main: `work` is done behind the walls, where `inside` is set."""
    try:
        if inside is None:
            return run_apart(module, arguments)
        settle_inside()
        return work()
    except PyambientError as error:
        sys.stderr.write(f"{module}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def settle_inside() -> None:
    """What the inner process does first: a /run and a bpffs that nobody else sees.

    And a claim to the CPU before all else that runs on the machine, for all that it starts.
    """
    os.setpriority(os.PRIO_PROCESS, 0, _FIRST)
    # Where sessions share the CPU as groups (CONFIG_SCHED_AUTOGROUP), what one may have of it is
    # up to the group's own nice value. That of the caller's session is the caller's.
    os.setsid()
    if _AUTOGROUP.exists():
        _AUTOGROUP.write_text(str(_FIRST))
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    if Path("/sys/fs/bpf").is_dir():
        subprocess.run(["mount", "-t", "bpf", "bpf", "/sys/fs/bpf"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


@contextlib.contextmanager
def _subtree() -> Iterator[Path]:
    root = find_cgroup2_root()
    if root is None:
        raise PyambientError("cgroup2 is not mounted", "run 'mount -t cgroup2 none DIR'")
    top = root / f"pyambient-bench-{os.getpid()}"
    top.mkdir()
    try:
        yield top
    finally:
        _remove(top)


def _remove(top: Path) -> None:
    """Remove the sub-tree, leaves first; its processes ended with their process namespace."""
    deadline = time.monotonic() + _PATIENCE
    folders = sorted((Path(path) for path, _, _ in os.walk(top)), reverse=True)
    while folders:
        try:
            folders[0].rmdir()
            folders.pop(0)
        except OSError:
            if time.monotonic() > deadline:
                raise PyambientError(
                    f"{folders[0]} cannot be removed", "see its cgroup.procs"
                ) from None
            time.sleep(0.02)
