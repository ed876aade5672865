"""Programs that tests compile for themselves: bad ones, and other tools'."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyambient.intercept import loader

_SOURCES = Path(__file__).parents[2] / "bpf"
_FOREIGN = """
#include "maps.h"
SEC("cgroup/connect4") int cil_sock4_connect(struct bpf_sock_addr *ctx) { return 1; }
char _license[] SEC("license") = "Dual BSD/GPL";
"""


def compile_program(source: str, directory: Path, name: str) -> None:
    """Compile C to `directory/<name>.o` as bpf/Makefile does."""
    if shutil.which("clang") is None:
        pytest.skip("there is no clang here to compile the test's own program")
    (directory / f"{name}.bpf.c").write_text(source)
    places = [f"OBJECTS={directory}", f"VPATH={directory}"]
    subprocess.run(["make", "-s", *places, f"{directory}/{name}.o"], cwd=_SOURCES, check=True)


@contextlib.contextmanager
def foreign_program(directory: Path) -> Iterator[int]:
    """The fd of a loaded connect4 program with the name that Cilium's has."""
    compile_program(_FOREIGN, directory, "foreign")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "OBJECTS", directory)
        loaded = loader.load("foreign")
    with loaded:
        yield loaded.program_fd("cil_sock4_connect")
