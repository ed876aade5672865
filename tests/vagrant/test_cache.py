"""The test bed's stages: made once, anew when an input changes, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from vagrant.testbed import cache
from vagrant.testbed.errors import BedError


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of the test's own, with room to build in."""
    monkeypatch.setenv("PYAMBIENT_CACHE", str(tmp_path))
    monkeypatch.delenv("PYAMBIENT_NO_BUILD", raising=False)
    monkeypatch.setattr(cache, "_ROOM", 0)
    return tmp_path / "testbed"


def _write(text: str) -> object:
    return lambda part: (part / "file").write_text(text)


def test_a_stage_is_made_once() -> None:
    """The second request finds what the first one made."""
    cache.folder("stage", "a stage", "key", _write("first"))
    done = cache.folder("stage", "a stage", "key", _write("second"))

    assert (done / "file").read_text() == "first"


def test_another_key_makes_it_anew(root: Path) -> None:
    """A stage of another key is made, and the outdated one goes."""
    cache.folder("stage", "a stage", "one", _write("first"))
    done = cache.folder("stage", "a stage", "two", _write("second"))

    assert (done / "file").read_text() == "second"
    assert [path.name for path in root.iterdir() if path.is_dir()] == ["stage-two"]


def test_stages_do_not_remove_each_other() -> None:
    """Only the same stage's folders are outdated by a new one."""
    other = cache.folder("other", "another stage", "key", _write(""))
    cache.folder("stage", "a stage", "key", _write(""))

    assert other.is_dir()


def test_a_failed_stage_leaves_nothing(root: Path) -> None:
    """A stage that fails half way is not there, and is made at the next request."""

    def fail(part: Path) -> None:
        (part / "file").write_text("half")
        raise BedError("it broke", "mend it")

    with pytest.raises(BedError, match="it broke; mend it"):
        cache.folder("stage", "a stage", "key", fail)

    assert [path for path in root.iterdir() if path.is_dir()] == []
    assert cache.folder("stage", "a stage", "key", _write("whole")).is_dir()


def test_a_full_disk_is_said_before_building(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for a build there is one line about it, and no attempt."""
    monkeypatch.setattr(cache, "_ROOM", 1 << 60)

    with pytest.raises(BedError, match="free some disk space"):
        cache.folder("stage", "a stage", "key", pytest.fail)


def test_a_cache_that_cannot_be_written_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cache folder that is a file gives one line that names the variable."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("PYAMBIENT_CACHE", str(tmp_path / "file"))

    with pytest.raises(BedError, match="set PYAMBIENT_CACHE"):
        cache.folder("stage", "a stage", "key", pytest.fail)


def test_forbidden_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing may be built, a missing stage is an error that says how to build it."""
    monkeypatch.setenv("PYAMBIENT_NO_BUILD", "")
    cache.forbid_building()

    with pytest.raises(BedError, match="run vagrant/build-box"):
        cache.folder("stage", "a stage", "key", pytest.fail)


def test_the_digest_sees_contents(tmp_path: Path) -> None:
    """A file counts by what is in it, and texts do not run into each other."""
    path = tmp_path / "input"
    path.write_text("one")
    before = cache.digest(path)
    path.write_text("two")

    assert cache.digest(path) != before
    assert cache.digest("ab", "c") != cache.digest("a", "bc")
