"""Enrol a network namespace from Python, do something in the mesh, and free it again.

    sudo pyambient up                                        # in another terminal
    sudo .venv/bin/python examples/enrol_by_python.py NETNS COMMAND [ARGUMENT...]

runs COMMAND inside NETNS with the identity spiffe://cluster.local/ns/default/sa/NETNS. Asking the
agent is one synchronous call, `ask`; what it refuses it refuses by a `PyambientError`, whose text
says what happened and what to do next.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from pyambient.agent.client import ask
from pyambient.agent.config import DEFAULT_RUN_DIR, RunDir
from pyambient.errors import PyambientError


@contextlib.contextmanager
def enrolled(netns: str, run_dir: RunDir) -> Iterator[dict[str, Any]]:
    """Have `netns` in the mesh for the block; what `pyambient status -o json` says of it."""
    names = {"netns": netns, "name": netns, "namespace": "default", "service_account": netns}
    pod = ask(run_dir, "enroll", **names)
    try:
        yield pod
    finally:
        ask(run_dir, "unenroll", netns=netns)


def main(netns: str, *command: str) -> int:
    try:
        with enrolled(netns, RunDir(DEFAULT_RUN_DIR)) as pod:
            print(f"{pod['name']} ({', '.join(pod['addresses'])}) is in the mesh: {pod['backend']}")
            return subprocess.run(["ip", "netns", "exec", netns, *command], check=False).returncode
    except PyambientError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} NETNS COMMAND [ARGUMENT...]")
    sys.exit(main(*sys.argv[1:]))
