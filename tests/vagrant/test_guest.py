"""What the guest is made of is in the key that names its folder in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from vagrant.testbed import guest


@pytest.mark.parametrize("name", ["_PACKAGES", "_LEFT_OUT", "SERIES", "_BUILD_TOOLS", "_PLATFORMS"])
def test_what_goes_in_changes_the_key(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One package, kernel or platform more makes another guest."""
    before = guest.key()
    monkeypatch.setattr(guest, name, (*getattr(guest, name), "another"))

    assert guest.key() != before


@pytest.mark.parametrize(
    "name", ["_make_debian", "_make_python", "_make_image", "_take_kernels", "_mke2fs"]
)
def test_how_it_is_made_changes_the_key(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A function that makes a part of it, changed, makes another guest."""
    before = guest.key()
    monkeypatch.setattr(guest, name, lambda part: part)

    assert guest.key() != before


def test_the_size_of_the_disk_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger image is another image."""
    before = guest.key()
    monkeypatch.setattr(guest, "IMAGE_GIB", guest.IMAGE_GIB + 1)

    assert guest.key() != before


def test_a_file_for_the_guest_changes_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is copied into the guest counts by its contents."""
    monkeypatch.setattr(guest, "_FILES", tmp_path)
    for name in ("init", "initramfs-modules"):
        (tmp_path / name).write_text("one")
    before = guest.key()
    (tmp_path / "init").write_text("two")

    assert guest.key() != before
