"""A kernel without bpf(2), from Debian's kernel source: every kernel that Debian ships has it."""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path

from . import cache, host, progress
from .errors import BedError
from .packages import Packages

SERIES = "6.1"
_CONFIG = Path(__file__).parent.parent / "nobpf.config"
_COMPILERS = ("gcc", "make", "flex", "bison", "bc", "libelf-dev", "xz-utils")
_TITLE = "kernel without BPF"


def kernel() -> Path:
    """The bzImage; the first time, it takes a compiler five minutes of both CPUs."""
    key = cache.digest(SERIES, _CONFIG, inspect.getsource(_make))
    return cache.folder("nobpf", _TITLE, key, _make) / "vmlinuz"


def _make(part: Path) -> None:
    host.install(*_COMPILERS)
    log = part.parent / "nobpf.log"
    log.unlink(missing_ok=True)
    (scratch := part / "apt").mkdir()
    packages = Packages(scratch, log)
    packages.update()
    deb = packages.download(f"linux-source-{SERIES}")

    def step(*command: str | Path, cwd: Path | None = None) -> None:
        progress.run(_TITLE, command, log, cwd)

    step("dpkg-deb", "--extract", deb, part)
    step("tar", "-xf", part / f"usr/src/linux-source-{SERIES}.tar.xz", "-C", part)
    tree = part / f"linux-source-{SERIES}"
    make = ("make", "-s", f"-j{os.cpu_count()}")
    step(*make, "tinyconfig", cwd=tree)
    # Before olddefconfig, which would otherwise keep tinyconfig's answers to the same questions.
    step("scripts/kconfig/merge_config.sh", "-m", ".config", _CONFIG, cwd=tree)
    step(*make, "olddefconfig", cwd=tree)
    _require_config(tree / ".config")
    step(*make, "bzImage", cwd=tree)
    shutil.copy(tree / "arch/x86/boot/bzImage", part / "vmlinuz")
    shutil.copy(tree / ".config", part / "config")
    for used_up in (tree, scratch, part / "usr"):
        shutil.rmtree(used_up)


def _require_config(config: Path) -> None:
    """A line of the fragment that kconfig dropped (renamed, missing dependency) is an error."""
    made = set(config.read_text().splitlines())
    wanted = [line for line in _CONFIG.read_text().splitlines() if "CONFIG_" in line]
    lost = [line for line in wanted if line not in made and not _absent(line, made)]
    if lost:
        raise BedError(f"kconfig did not take {', '.join(lost)}", f"correct {_CONFIG.name}")


def _absent(line: str, made: set[str]) -> bool:
    """A line `# CONFIG_X is not set` also holds where X does not exist for want of another."""
    name = line.removeprefix("# ").removesuffix(" is not set")
    return line.startswith("#") and f"{name}=y" not in made
