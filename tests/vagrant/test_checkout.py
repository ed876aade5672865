"""The job disk: what of a checkout goes into a guest."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

from vagrant.testbed import checkout
from vagrant.testbed.errors import BedError


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout with a tracked, an untracked, an ignored and a removed file, and built ones."""
    root = tmp_path / "clone"
    objects = root / "pyambient/intercept/objects"
    objects.joinpath("source").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / ".gitignore").write_text("objects/\n/ignored\n")
    for name in ("tracked", "removed", "ignored"):
        (root / name).write_text(name)
    subprocess.run(["git", "-C", str(root), "add", "tracked", "removed"], check=True)
    (root / "removed").unlink()
    (root / "untracked").write_text("untracked")
    (objects / "connect.o").write_bytes(b"\x7fELF")
    (objects / "source/maps.h").write_text("")
    return root


def test_what_goes_in(clone: Path) -> None:
    """Tracked and new files and what was built; neither other ignored files nor removed ones."""
    names = [str(path) for path in checkout.files(clone)]

    built = ["connect.o", "source/maps.h"]
    built = [f"pyambient/intercept/objects/{name}" for name in built]
    assert names == [".gitignore", *built, "tracked", "untracked"]


def test_the_job_disk(clone: Path, tmp_path: Path) -> None:
    """A tar of whole sectors: the command, quoted for a shell, and the files with their modes."""
    (clone / "tracked").chmod(0o755)
    disk = tmp_path / "job"

    checkout.write_job(disk, ["echo", "it's"], clone)

    assert disk.stat().st_size % 512 == 0
    with tarfile.open(disk) as job:
        assert job.extractfile("command").read() == b"exec echo 'it'\"'\"'s'\n"
        assert job.getmember("checkout/tracked").mode == 0o755
        assert job.getmember("checkout/tracked").mtime == int((clone / "tracked").stat().st_mtime)
        assert job.extractfile("checkout/untracked").read() == b"untracked"


def test_no_checkout(tmp_path: Path) -> None:
    """A folder that git knows nothing of gives one line."""
    with pytest.raises(BedError, match="is no git checkout"):
        checkout.files(tmp_path)
