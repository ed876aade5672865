"""Probing: features are found by trying, and decide what `auto` is."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyambient.errors import PyambientError, UnsupportedFeature, UsageError
from pyambient.intercept import libbpf, loader, mounts, probe
from pyambient.intercept.choose import choose
from pyambient.intercept.interface import Site
from pyambient.intercept.loader import Constants
from pyambient.intercept.options import CaptureOptions
from tests.bed import Bed, CgroupTree
from tests.bed.seccomp import forbid_bpf
from tests.bed.snapshot import pins

_CLONE_NEWNS = 0x00020000


@pytest.fixture(autouse=True)
def _probed_anew() -> Iterator[None]:
    """Nothing that another test found out counts here, or the other way round."""
    probe.probe.cache_clear()
    yield
    probe.probe.cache_clear()


@pytest.fixture
def site(cgroup_tree: CgroupTree, tmp_path: Path) -> Site:
    return Site(tmp_path, Path("/sys/fs/bpf/pyambient"), cgroup_tree.path)


def test_this_kernel_has_what_is_needed(site: Site) -> None:
    """Where the backend's own tests run nothing needed is missing, and `auto` is `bpf`."""
    assert [f for f in probe.probe(site.cgroup, "bpf") if f.needed and not f.present] == []
    assert choose("auto", site).name == choose("bpf", site).name == "bpf"


@pytest.mark.parametrize("backend", ["bpf", "tc"])
def test_probing_leaves_nothing(cgroup_tree: CgroupTree, backend: str) -> None:
    """No pin, cgroup or descriptor (so no link either) and no other namespace stays of a probe."""

    def around() -> tuple[object, ...]:
        descriptors = {path.name for path in Path("/proc/self/fd").iterdir()}
        netns = Path("/proc/thread-self/ns/net").stat().st_ino
        return pins(), cgroup_tree.directories(), descriptors, netns

    before = around()
    probe.probe(cgroup_tree.path, backend)
    assert around() == before


def test_probing_once(site: Site) -> None:
    """A process asks the kernel once."""
    assert probe.probe(site.cgroup, "bpf") is probe.probe(site.cgroup, "bpf")


def _without_bpf(site: Site) -> tuple[str, UnsupportedFeature]:
    forbid_bpf()
    with pytest.raises(UnsupportedFeature) as refused:
        choose("bpf", site)
    return choose("auto", site).name, refused.value.exit_code, str(refused.value)


def test_a_kernel_without_bpf(bed: Bed, site: Site) -> None:
    """Where bpf(2) does not exist `auto` is `nftables`, and `bpf` is refused with exit code 3."""
    name, code, text = bed.node.run(_without_bpf, site, uid=0, gid=0)

    assert (name, code) == ("nftables", 3)
    assert text == (
        "this kernel has no bpf(2) (Linux 4.4 and later do); use --backend nftables or iptables"
    )


@pytest.mark.parametrize(
    ("refused", "auto", "error"),
    [
        ("sk_lookup", "nftables", "Linux 5.9 and later"),
        ("SO_NETNS_COOKIE", "bpf", ""),
        ("ingress_ifindex in sk_lookup", "bpf", ""),
        ("bpf_set_retval", "bpf", ""),
        ("cgroup links for connect and bind", "tc", "Linux 5.9 and later"),
    ],
)
def test_a_missing_feature(
    site: Site, monkeypatch: pytest.MonkeyPatch, refused: str, auto: str, error: str
) -> None:
    """A needed feature decides for another backend and is named; else there is something else."""
    _refuse(monkeypatch, refused, "run")

    assert choose("auto", site).name == auto
    (feature,) = [f for f in probe.probe(site.cgroup, "bpf") if f.name == refused]
    assert (feature.present, feature.needed, bool(feature.instead)) == (False, bool(error), True)
    if error:
        with pytest.raises(UnsupportedFeature, match=f"{refused} .{error}"):
            choose("bpf", site)


def test_auto_is_not_tc_where_it_could_not_be_guarded(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without nf_tables nothing holds back what leaves by a new device."""
    _refuse(monkeypatch, "nf_tables, family inet", "run")
    behind = {"virtual_interfaces": "tap0"}
    assert choose("auto", site, options=CaptureOptions(**behind)).name == "nftables"
    assert choose("auto", site, options=CaptureOptions(**behind, guard="off")).name == "tc"


def _refuse(monkeypatch: pytest.MonkeyPatch, name: str, *attempts: str) -> None:
    """Let the attempts (`run`, `alternative`) at a feature fail."""

    def refuse(_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    changed = {
        backend: tuple(
            dataclasses.replace(a, **dict.fromkeys(attempts, refuse)) if a.name == name else a
            for a in known
        )
        for backend, known in probe._ATTEMPTS.items()
    }
    monkeypatch.setattr(probe, "_ATTEMPTS", changed)


@pytest.mark.parametrize("refused", ["SO_NETNS_COOKIE", "ingress_ifindex in sk_lookup"])
def test_an_alternative_that_is_missing_as_well(
    site: Site, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """Without a feature and what stands in for it `auto` is another; both reasons are told."""
    _refuse(monkeypatch, refused, "run", "alternative")

    assert choose("auto", site).name == "nftables"
    lack = probe.lacking(site.cgroup)
    assert lack is not None
    assert (lack.name, lack.instead) == (refused, "--backend nftables or iptables")
    assert lack.error.count("Invalid argument") == 2
    with pytest.raises(
        UnsupportedFeature, match=f"{refused} .*; use --backend nftables or iptables"
    ):
        choose("bpf", site)


def test_the_programs_are_told_what_was_found(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails here is what the constants of the programs leave out."""
    _refuse(monkeypatch, "ingress_ifindex in sk_lookup", "run")
    assert not probe.constants(site.cgroup).has_ingress_ifindex

    probe.probe.cache_clear()
    _refuse(monkeypatch, "bpf_set_retval", "run")
    assert probe.constants(site.cgroup) == Constants(node=probe.node_cookie(site.cgroup))


def test_no_cgroup2(site: Site) -> None:
    """A node without cgroup2 gets `nftables`."""
    nowhere = Site(site.run_dir, site.bpffs, None)
    assert choose("auto", nowhere).name == "nftables"
    with pytest.raises(PyambientError, match=r"not mounted.*mount -t cgroup2"):
        choose("bpf", nowhere)


def test_programs_that_were_not_compiled(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing objects are a matter of the installation: the error says so, not "kernel"."""
    monkeypatch.setattr(loader, "OBJECTS", tmp_path)
    with pytest.raises(PyambientError, match="run 'make -C bpf'") as missing:
        choose("bpf", site)
    assert missing.value.exit_code == 1


def test_no_libbpf(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without libbpf the error says what to install."""
    real = ctypes.CDLL

    def without(name: str | None, **options: bool) -> ctypes.CDLL:
        if name == "libbpf.so.1":
            raise OSError(errno.ENOENT, "cannot open shared object file")
        return real(name, **options)

    libbpf._library.cache_clear()
    monkeypatch.setattr(libbpf.ctypes, "CDLL", without)
    with pytest.raises(PyambientError, match="apt install libbpf1"):
        choose("bpf", site)
    assert choose("auto", site).name == "nftables"


def test_an_unknown_backend(site: Site) -> None:
    """A backend that does not exist is a usage error that lists those that do."""
    names = "auto, bpf, tc, nftables, iptables"
    with pytest.raises(UsageError, match=f"no backend 'xdp'; choose one of {names}"):
        choose("xdp", site)


def test_mount_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mount points are found by type, whatever their names and optional fields."""
    table = tmp_path / "mountinfo"
    table.write_text(
        "22 1 8:1 / / rw - ext4 /dev/root rw\n"
        "30 22 0:26 / /sys/fs/cgroup rw shared:9 - tmpfs tmpfs ro\n"
        "31 30 0:27 / /sys/fs/cgroup/unified rw shared:10 master:1 - cgroup2 cgroup2 rw\n"
        r"40 22 0:30 / /run/with\040space rw - bpf bpf rw"
        "\n"
    )
    monkeypatch.setattr(mounts, "MOUNTINFO", table)

    assert mounts.find_cgroup2_root() == Path("/sys/fs/cgroup/unified")
    assert mounts.mount_points("bpf") == [Path("/run/with space")]
    assert mounts.mount_points("nfs") == []


def _bpffs_mounted(directory: Path) -> tuple[list[bool], int]:
    """In a mount namespace of its own, where nothing is mounted at the directory's parent."""
    ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS)
    found = [mounts.is_on(directory, "bpf")]
    for _ in range(2):
        mounts.ensure_bpffs(directory)
        found.append(mounts.is_on(directory, "bpf"))
    return found, mounts.mount_points("bpf").count(directory.parent)


def test_bpffs_is_mounted_once(bed: Bed, tmp_path: Path) -> None:
    """Where no bpffs is mounted one is, at the parent of the pin directory."""
    found = bed.node.run(_bpffs_mounted, tmp_path / "pyambient", uid=0, gid=0)

    assert found == ([False, True, True], 1)
