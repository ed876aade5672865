"""The job disk, one tar: this checkout as git sees it, what was built for it, and the command."""

from __future__ import annotations

import io
import shlex
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import BedError

ROOT = Path(__file__).parent.parent.parent
# What git ignores and a guest has no compiler for.
_BUILT = ("pyambient/intercept/objects/*.o", "pyambient/intercept/objects/source/*")
# qemu rounds a raw disk to whole sectors.
_SECTOR = 512


def files(root: Path = ROOT) -> list[Path]:
    """What of the checkout goes in, relative to `root`: tracked, not yet added, or built."""
    # The checkout may belong to another user than the one who boots the guest.
    git = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
    listing = [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BedError(f"{root} is no git checkout ({done.stderr.strip()})", "clone the repository")
    names = [Path(name) for name in done.stdout.split("\0") if name]
    built = [path.relative_to(root) for pattern in _BUILT for path in root.glob(pattern)]
    return sorted({name for name in (*names, *built) if (root / name).is_file()})


def write_job(disk: Path, command: Sequence[str], root: Path = ROOT) -> None:
    """Write the tar that the guest's init reads: `command` and `checkout/`."""
    with tarfile.open(disk, "w") as job:
        for info, content in _members(command, root):
            info.size = len(content)
            job.addfile(info, io.BytesIO(content))
    with disk.open("r+b") as raw:
        raw.truncate(-(-disk.stat().st_size // _SECTOR) * _SECTOR)


def _members(command: Sequence[str], root: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    yield tarfile.TarInfo("command"), f"exec {shlex.join(command)}\n".encode()
    for name in files(root):
        path = root / name
        info = tarfile.TarInfo(f"checkout/{name}")
        status = path.stat()
        # make(1) compares times: objects must stay newer than their sources.
        info.mode, info.mtime = status.st_mode & 0o777, int(status.st_mtime)
        yield info, path.read_bytes()
