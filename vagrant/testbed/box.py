"""The Vagrant box: the guest's image as qcow2, its key, and what vagrant-libvirt reads about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from . import cache, progress
from .guest import IMAGE_GIB, Guest

_TITLE = "Vagrant box"
_METADATA = {"provider": "libvirt", "format": "qcow2", "virtual_size": IMAGE_GIB}
# The key is this build's own: Vagrant's well-known one opens a guest to everybody.
_VAGRANTFILE = """\
Vagrant.configure("2") do |config|
  config.ssh.private_key_path = File.expand_path("vagrant_key", __dir__)
  config.ssh.insert_key = false
end
"""


def box(guest: Guest) -> Path:
    """pyambient.box of this guest. It has no boot loader: the Vagrantfile names kernels."""
    key = cache.digest(guest.folder.name, Path(__file__))

    def make(part: Path) -> None:
        log = part.parent / "box.log"
        log.unlink(missing_ok=True)
        (part / "metadata.json").write_text(json.dumps(_METADATA))
        (part / "Vagrantfile").write_text(_VAGRANTFILE)
        shutil.copy(guest.ssh_key, part / "vagrant_key")
        image = [guest.image, part / "box.img"]
        progress.run(_TITLE, ["qemu-img", "convert", "-O", "qcow2", *image], log)
        members = ["metadata.json", "Vagrantfile", "vagrant_key", "box.img"]
        progress.run(_TITLE, ["tar", "-cf", "pyambient.box", *members], log, cwd=part)
        for member in members:
            (part / member).unlink()

    return cache.folder("box", _TITLE, key, make) / "pyambient.box"
