"""The rules of backend `iptables`: which tool writes them, their repair, and that none is left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pyambient.errors import PyambientError
from pyambient.intercept import iptables_tools, programs
from pyambient.intercept.iptables import Iptables
from pyambient.intercept.runner import apply_stages
from pyambient.intercept.survey import survey
from tests.bed import Bed, BedPod, kernel_state

from .netfilter_mesh import NetfilterMesh, target


def test_nothing_is_left(bed: Bed) -> None:
    """After un-enrolment rules, routes, sysctls, tables and chains are what they were."""
    a, b, v4_only = bed.pod("a"), bed.pod("b"), bed.pod("v4", ipv6=False)
    before = kernel_state(a, b, v4_only)
    with NetfilterMesh(bed, a, b, v4_only, interceptor=Iptables("nft")):
        assert kernel_state(a, b, v4_only) != before
    assert kernel_state(a, b, v4_only) == before


def test_foreign_rules_stay(bed: Bed) -> None:
    """Rules that an app put in the tables we use are there afterwards, and nothing else is."""
    a, b = bed.pod("a"), bed.pod("b")
    a.command("iptables-nft", "-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.9", "-j", "ACCEPT")
    a.command("ip6tables-nft", "-t", "mangle", "-N", "APP")
    before = kernel_state(a, b)
    with NetfilterMesh(bed, a, b, interceptor=Iptables("nft")):
        pass
    assert kernel_state(a, b) == before


def test_rules_added_meanwhile_stay(bed: Bed) -> None:
    """A table that we made is not ours alone once an app has a rule in it."""
    a, b = bed.pod("a"), bed.pod("b")
    with NetfilterMesh(bed, a, b, interceptor=Iptables("nft")):
        a.command("iptables-nft", "-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.9", "-j", "ACCEPT")
    assert "-A OUTPUT -d 192.0.2.9/32 -j ACCEPT" in a.command("iptables-nft-save")
    assert "table" not in b.command("nft", "list", "ruleset")


def test_nothing_is_left_in_legacy_tables(bed: Bed) -> None:
    """The legacy tables cannot be unregistered, but no rule or chain of ours is in them."""
    a, b = bed.pod("a"), bed.pod("b")
    with NetfilterMesh(bed, a, b, interceptor=Iptables("legacy")):
        assert "ISTIO_" in a.command("iptables-legacy-save")
    for pod in (a, b):
        saved = pod.command("iptables-legacy-save") + pod.command("ip6tables-legacy-save")
        assert [line for line in saved.splitlines() if line.startswith("-A")] == []
        assert "ISTIO_" not in saved


@pytest.mark.parametrize("variant", ["nft", "legacy"])
@pytest.mark.parametrize(
    "damage",
    ["-D ISTIO_OUTPUT 2", "-D OUTPUT 1", "-F ISTIO_PRERT", "-F"],
)
def test_a_damaged_chain_is_made_whole(bed: Bed, variant: str, damage: str) -> None:
    """Applied again, the chains are what they were, whatever an app as root did to them."""
    a, b = bed.pod("a"), bed.pod("b")
    with NetfilterMesh(bed, a, b, interceptor=Iptables(variant)) as mesh:
        whole = _rules(a, variant)
        a.command(f"iptables-{variant}", "-t", "nat", *damage.split())
        assert _rules(a, variant) != whole
        apply_stages(target(a), mesh.recorded["a"])
        assert _rules(a, variant) == whole


def _rules(pod: BedPod, variant: str) -> list[str]:
    saved = pod.command(f"iptables-{variant}-save", "-t", "nat")
    return sorted(line for line in saved.splitlines() if line.startswith("-A"))


def test_the_variant_follows_the_pod(bed: Bed) -> None:
    """Rules go where the pod's own are; without any, to nf_tables; and they do not move later."""
    plain, legacy = bed.pod("a"), bed.pod("b")
    legacy.command("iptables-legacy", "-A", "OUTPUT", "-d", "192.0.2.9", "-j", "ACCEPT")
    with NetfilterMesh(bed, plain, legacy, interceptor=Iptables()) as mesh:
        assert "ISTIO_" in plain.command("nft", "list", "ruleset")
        assert "ISTIO_" in legacy.command("iptables-legacy-save")
        assert "ISTIO_" not in legacy.command("nft", "list", "ruleset")

        plain.command("iptables-legacy", "-A", "OUTPUT", "-d", "192.0.2.9", "-j", "ACCEPT")
        before = mesh.recorded["a"]
        mesh.refresh(plain)
        assert mesh.recorded["a"] == before


@pytest.mark.parametrize(
    ("installed", "variant"),
    [
        (("iptables-restore", "iptables-legacy-restore", "iptables-nft-restore"), "nft"),
        (("iptables-restore", "iptables-legacy-restore"), "legacy"),
        (("iptables-restore",), ""),
    ],
)
def test_the_variant_is_one_that_is_installed(
    bed: Bed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: tuple[str, ...],
    variant: str,
) -> None:
    """The newest of the tools that this node has."""
    for name in installed:
        (tmp_path / name).symlink_to(shutil.which(name))
    monkeypatch.setattr(programs, "_PATH", str(tmp_path))
    assert iptables_tools.choose_variant(bed.pod("a").netns) == variant


def test_without_iptables_the_error_says_what_to_install(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is planned with tools that are not there."""
    pod = bed.pod("a")
    monkeypatch.setattr(programs, "_PATH", str(tmp_path))
    with pytest.raises(PyambientError) as caught:
        Iptables().plan(target(pod), survey(pod.netns))
    assert caught.value.then == "install it with 'apt install iptables', or use --backend bpf"
