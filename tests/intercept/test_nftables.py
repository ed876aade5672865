"""The tables of backend `nftables`: as they are printed, made whole, and gone without a trace."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyambient.errors import PyambientError
from pyambient.intercept import programs, scratch
from pyambient.intercept.choose import choose
from pyambient.intercept.interface import Plan, Site, Step
from pyambient.intercept.nftables import Inbound, Nftables, Outbound, Tables
from pyambient.intercept.runner import StepFailed, apply_stages, undo_stages, verify
from pyambient.intercept.survey import survey
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import OUTBOUND_PORT
from tests.bed import Bed, BedPod, apps, kernel_state

from .netfilter_mesh import NetfilterMesh, target

RULES = (Tables, Inbound, Outbound)
NO_CGROUP = Site(Path("/run/pyambient-unused"), Path("/sys/fs/bpf/pyambient"), None)


def _plan(pod: BedPod) -> Plan:
    return Nftables().plan(target(pod), survey(pod.netns))


def _ruleset(pod: BedPod) -> str:
    return str(pod.command("nft", "list", "ruleset"))


def _by_chain(pod: BedPod) -> list[Any]:
    """What `nft list ruleset` tells, without handles and whatever the order of the chains."""
    (_, *items) = json.loads(pod.command("nft", "-j", "list", "ruleset"))["nftables"]
    found = [(kind, fields) for item in items for kind, fields in item.items()]
    for _, fields in found:
        del fields["handle"]

    def place(one: tuple[str, dict[str, Any]]) -> tuple[str, ...]:
        kind, fields = one
        return kind, fields["family"], fields.get("chain", fields.get("name"))

    return sorted(found, key=place)


def test_nothing_is_left(bed: Bed) -> None:
    """After un-enrolment tables, routes, rules and sysctls are what they were."""
    a, b, v4_only = bed.pod("a"), bed.pod("b"), bed.pod("v4", ipv6=False)
    before = kernel_state(a, b, v4_only)
    with NetfilterMesh(bed, a, b, v4_only, interceptor=Nftables()):
        assert "table ip6 pyambient" in _ruleset(a)
        assert "table ip pyambient" in _ruleset(v4_only)
        assert "table ip6 pyambient" not in _ruleset(v4_only)
    assert kernel_state(a, b, v4_only) == before


def test_rules_of_others_stay(bed: Bed) -> None:
    """Tables of the app's own, made before or meanwhile, are there afterwards."""
    a, b = bed.pod("a"), bed.pod("b")
    a.command("iptables-nft", "-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.9", "-j", "ACCEPT")
    before = kernel_state(a, b)
    with NetfilterMesh(bed, a, b, interceptor=Nftables()):
        b.command("nft", "add table ip app")
    assert "table ip app" in _ruleset(b)
    b.command("nft", "delete table ip app")
    assert kernel_state(a, b) == before


def test_what_is_printed_is_what_is_loaded(bed: Bed) -> None:
    """The text of `--dry-run`, given to nft, makes the tables that the backend makes."""
    loaded, printed = bed.pod("a"), bed.pod("b")
    steps = [step for step in _plan(loaded).steps if isinstance(step, RULES)]
    apply_stages(target(loaded), steps)
    for step in steps:
        printed.command("sh", "-ec", step.describe())
    assert _ruleset(printed) == _ruleset(loaded)


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        ("flush chain ip pyambient outbound", "no rule 'an answer to a health probe' in ip"),
        ("flush chain ip6 pyambient inbound", "no rule 'a health probe of the node' in ip6"),
        ("flush chain ip pyambient replies_out", "no rule 'an app answers the proxy' in ip"),
        ("insert rule ip pyambient inbound accept", "ip pyambient inbound holds other rules"),
        ("delete chain ip6 pyambient inbound", "no chain ip6 pyambient inbound"),
        ("add table ip6 pyambient { flags dormant; }", "table ip6 pyambient is dormant"),
        ("delete table ip pyambient", "no chain ip pyambient replies_in"),
    ],
)
def test_damage_is_found_and_repaired(bed: Bed, damage: str, finding: str) -> None:
    """Whatever root in the pod did to the tables: applied again, they are what they were."""
    a, b = bed.pod("a"), bed.pod("b")
    with NetfilterMesh(bed, a, b, interceptor=Nftables()) as mesh:
        whole = _by_chain(a)
        if damage.startswith("delete chain"):
            a.command("nft", damage.replace("delete", "flush"))
        a.command("nft", damage)
        assert finding in verify(target(a), mesh.recorded["a"])[0]
        assert apply_stages(target(a), mesh.recorded["a"]) == mesh.recorded["a"]
        assert verify(target(a), mesh.recorded["a"]) == []
        assert _by_chain(a) == whole


def _spoiled(step: Step, **fields: object) -> Step:
    """The step with its last rule, which is of IPv6, spoiled."""
    assert isinstance(step, RULES)
    bad = json.loads(step.rules[-1]) | fields
    return dataclasses.replace(step, rules=(*step.rules[:-1], json.dumps(bad)))


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(
    "spoiling",
    [
        {"expr": [{"no such statement": None}]},
        {"expr": [{"jump": {"target": "nowhere"}}]},
        {"chain": "nowhere"},
    ],
)
def test_a_rule_that_fails_to_load_leaves_nothing(
    bed: Bed, kind: type[Step], spoiling: dict[str, object]
) -> None:
    """Refused by nft or by the kernel, in any stage: no rule of either family, no table stays."""
    pod, other = bed.pod("a"), bed.pod("b")
    before = kernel_state(pod, other)
    steps = [_spoiled(s, **spoiling) if isinstance(s, kind) else s for s in _plan(pod).steps]

    with pytest.raises(StepFailed) as caught:
        apply_stages(target(pod), steps)

    assert kernel_state(pod, other) == before
    assert caught.value.steps == ()
    assert "rror" in caught.value.what
    assert "\n" not in str(caught.value)


def test_an_apps_own_nat_is_no_way_around(bed: Bed, family: str) -> None:
    """Whether root in the pod made its chain before or after the enrolment, ours decides first."""
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    ip = "ip6" if family == "v6" else "ip"
    echo = c.spawn(apps.echo_server, 8080)
    assert echo.receive() == "listening"

    def translate() -> None:
        words = "-t nat -A OUTPUT -p tcp --dport 8080 -j REDIRECT --to-ports 1"
        a.command(f"{ip}tables-nft", *words.split())

    translate()
    with NetfilterMesh(bed, a, b, interceptor=Nftables()) as mesh:
        destination = SocketAddress(c.address(family), 8080)
        a.run(apps.request, destination)
        a.command("nft", f"delete table {ip} nat")
        translate()
        a.run(apps.request, destination)
        passed = [(seen.port, seen.original) for seen in mesh.intercepted()]
        assert passed == [(OUTBOUND_PORT, destination)] * 2


@pytest.fixture
def no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that is the only one where programs are looked for; nothing is cached."""
    monkeypatch.setattr(programs, "_PATH", str(tmp_path))
    scratch.nftables_refusal.cache_clear()
    yield tmp_path
    scratch.nftables_refusal.cache_clear()


def test_without_nft_the_error_says_what_to_install(bed: Bed, no_programs: Path) -> None:
    """The backend is refused before anything is touched, and `auto` passes it over."""
    with pytest.raises(PyambientError) as caught:
        choose("nftables", NO_CGROUP)
    assert str(caught.value) == (
        "there is no nft; install it with 'apt install nftables', or use --backend iptables"
    )
    assert choose("auto", NO_CGROUP).name == "iptables"


def test_an_nft_that_cannot_load_is_passed_over(bed: Bed, no_programs: Path) -> None:
    """Whether it lacks JSON or the kernel lacks nf_tables: trying tells, with exit code 3."""
    nft = no_programs / "nft"
    nft.write_text("#!/bin/sh\necho 'Error: JSON support not compiled-in' >&2; exit 1\n")
    nft.chmod(0o755)
    with pytest.raises(PyambientError, match="JSON support not compiled-in") as caught:
        choose("nftables", NO_CGROUP)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert choose("auto", NO_CGROUP).name == "iptables"


def test_trying_leaves_nothing(bed: Bed, no_programs: Path) -> None:
    """The scratch tables were never in the namespace of the node, or in one that stays."""
    (no_programs / "nft").symlink_to(str(shutil.which("nft")))
    pod = bed.pod("a")
    before = kernel_state(pod)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    assert choose("auto", NO_CGROUP).name == "nftables"
    assert kernel_state(pod) == before
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_a_pod_is_freed_without_nft(bed: Bed, tmp_path: Path) -> None:
    """Only loading takes nft: what was enrolled with it is undone where it is no longer there."""
    pod, other = bed.pod("a"), bed.pod("b")
    before = kernel_state(pod, other)
    recorded = apply_stages(target(pod), _plan(pod).steps)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(programs, "_PATH", str(tmp_path))
        undo_stages(target(pod), recorded)
    assert kernel_state(pod, other) == before
