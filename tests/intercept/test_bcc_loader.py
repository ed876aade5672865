"""The second loader: the same sources, compiled by bcc, are the same programs and maps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyambient.errors import PyambientError
from pyambient.intercept import bcc_object, loader
from pyambient.intercept.bcc_object import SOURCES, load
from pyambient.intercept.bpf_steps import SkLookup
from pyambient.intercept.kernel_headers import newest_headers
from pyambient.intercept.kernel_objects import program_info
from pyambient.intercept.loader import Constants, LoadedObject, ProgramRefused, load_compiled
from tests.bed import Bed

from .bpf_mesh import BpfMesh, target
from .clang import compile_program

_REFUSED = """
#include "maps.h"
SEC("cgroup/connect4")
int refused(struct bpf_sock_addr *ctx)
{
	return *(volatile __u32 *)(ctx->user_ip4 + 0UL);
}
DEFINE_LICENSE;
"""
_OTHER_SHAPE = """
#include "maps.h"
DEFINE_HASH(pods, __u32, __u32, 1);
SEC("cgroup/connect4")
int other(struct bpf_sock_addr *ctx)
{
	__u32 key = 0;

	return map_lookup(pods, &key) != NULL;
}
DEFINE_LICENSE;
"""
_PROGRAMS = sorted(path.name.removesuffix(".bpf.c") for path in SOURCES.glob("*.bpf.c"))


@pytest.fixture
def bind() -> Iterator[LoadedObject]:
    """A real source, compiled by clang ahead of time."""
    with load_compiled("bind", Constants(), {}) as loaded:
        yield loaded


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the test's own in the place of the sources, with the real headers."""
    for header in SOURCES.glob("*.h"):
        (tmp_path / header.name).write_text(header.read_text())
    monkeypatch.setattr(bcc_object, "SOURCES", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", _PROGRAMS)
def test_both_loaders_make_the_same_maps(isolated: None, name: str) -> None:
    """By name, type and sizes, so that either goes on where the other one stopped."""
    with (
        load(name, Constants(netns=1), {}) as by_bcc,
        load_compiled(name, Constants(netns=1), {}) as by_libbpf,
    ):
        assert _shapes(by_bcc) == _shapes(by_libbpf)


def _shapes(loaded: LoadedObject) -> dict[str, tuple[int, int, int, int]]:
    shapes = {}
    for name, made in loaded.maps().items():
        with made:
            shapes[name] = (*made.shape, made.max_entries)
    return shapes


def test_a_shared_map_is_the_one_that_programs_use(isolated: None, bind: LoadedObject) -> None:
    """Not the one that bcc made in its place."""
    with bind.maps()["pods"] as pods, load("bind", Constants(), {"pods": pods}) as loaded:
        program = program_info(_identifier(loaded.program_fd("pyamb_bind4")))
        assert program is not None
        assert pods.identifier in program.maps
        with loaded.maps()["pods"] as used:
            assert used.identifier == pods.identifier


def _identifier(program: int) -> int:
    """The id of the program behind a file descriptor."""
    (line,) = re.findall(r"^prog_id:\t(\d+)$", _fdinfo(program), re.MULTILINE)
    return int(line)


def _fdinfo(fd: int) -> str:
    return Path(f"/proc/self/fdinfo/{fd}").read_text()


def test_maps_that_the_compiler_left_out_are_not_missed(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To bcc a constant is known, and what it closes names no map: that was repaired for ever."""
    a, b = bed.pod("a"), bed.pod("b")
    with BpfMesh(bed, a, b) as mesh:
        (lookup,) = [step for step in mesh.recorded["a"] if isinstance(step, SkLookup)]
        lookup.undo(target(a))
        monkeypatch.setattr(loader, "_chosen", load)
        assert lookup.apply(target(a)).missing(target(a)) is None


def test_a_refused_program_shows_the_verifiers_reason(isolated: None, sources: Path) -> None:
    """The last line of its log that means something; all of the log is there as well."""
    (sources / "refused.bpf.c").write_text(_REFUSED)
    with pytest.raises(ProgramRefused, match="invalid mem access") as refused:
        load("refused", Constants(), {})
    assert len(refused.value.log) > 3


def test_a_map_of_another_shape(isolated: None, sources: Path, bind: LoadedObject) -> None:
    """A pinned map of another version is named, not misread."""
    (sources / "other.bpf.c").write_text(_OTHER_SHAPE)
    with (
        bind.maps()["pods"] as pods,
        pytest.raises(PyambientError, match="the pinned map pods is of another version"),
    ):
        load("other", Constants(), {"pods": pods})


def test_a_source_that_does_not_compile(isolated: None, sources: Path) -> None:
    """One line, and the way out; clang has said on stderr what it did not like."""
    (sources / "broken.bpf.c").write_text("this is not C")
    with pytest.raises(PyambientError, match=r"bcc cannot compile broken\.bpf\.c: .*; use --bpf-"):
        load("broken", Constants(), {})


def test_the_newest_headers_are_taken(tmp_path: Path) -> None:
    """By number, not by name; those that all flavours share are no kernel's."""
    for name in ("6.1.0-9-amd64", "6.1.0-10-amd64", "5.10.0-40-amd64", "6.1.0-11-common"):
        (tmp_path / f"linux-headers-{name}").mkdir()
        if not name.endswith("common"):
            (tmp_path / f"linux-headers-{name}" / ".config").touch()
    assert newest_headers(tmp_path).name == "linux-headers-6.1.0-10-amd64"


def test_no_headers(tmp_path: Path) -> None:
    """How to get some, and how to do without."""
    with pytest.raises(PyambientError, match=r"needs kernel headers.*; run 'apt"):
        newest_headers(tmp_path)


def test_libbpf_still_says_why_after_bcc(
    isolated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bcc brings a printer of its own for what libbpf says; ours is there again afterwards."""
    load("bind", Constants(), {}).close()
    monkeypatch.setattr(loader, "OBJECTS", tmp_path)
    compile_program(_REFUSED, tmp_path, "refused")
    with pytest.raises(ProgramRefused, match="invalid mem access"):
        load_compiled("refused", Constants(), {})
