"""The verdict on each kernel and backend, and how it is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from vagrant.testbed.examination import FALLBACK, Outcome, steps
from vagrant.testbed.report import Cell, Examined, columns, document, table
from vagrant.testbed.selection import Extent

_LACKING = {"group": "bpf", "name": "bpf(2)", "present": False, "needed": True}
_CHECK = {
    "backends": {"bpf": False, "iptables": True},
    "checks": [
        {**_LACKING, "problem": "Function not implemented", "hint": "instead: --backend iptables"},
        {"group": "iptables", "name": "rules", "present": True, "needed": True},
    ],
}
_TESTS = Outcome("iptables", "tests", 0, 10.0, passed=8)
_DEMO = Outcome("iptables", "demo", 0, 5.0)


_PLAN = [("iptables", "tests"), ("iptables", "demo")]


def _examined(*outcomes: Outcome) -> Examined:
    return Examined("nobpf", "6.1.1", _CHECK, _PLAN, outcomes)


def test_a_cell_works_when_all_its_steps_did() -> None:
    """Tests and demo that ended well make a cell that works, with their count."""
    assert _examined(_TESTS, _DEMO).cell("iptables", expected=True) == Cell(
        works=True, text="8/8 tests, demo"
    )


@pytest.mark.parametrize(
    "outcomes",
    [
        (_TESTS,),
        (_TESTS, dataclasses.replace(_DEMO, code=1)),
        (dataclasses.replace(_TESTS, code=1, failed=1), _DEMO),
        (),
    ],
)
def test_a_cell_fails_with_any_step(outcomes: tuple[Outcome, ...]) -> None:
    """A step that failed, and one that never ran, both fail the cell."""
    assert _examined(*outcomes).cell("iptables", expected=True).works is False


def test_a_step_that_never_ran_is_told() -> None:
    """The cell says what an examination that was cut short did not come to."""
    assert _examined(_TESTS).cell("iptables", expected=True).text == "8/8 tests, demo DID NOT RUN"


def test_what_is_not_there_has_to_say_so() -> None:
    """A backend the kernel is not meant to have is no failure if `check` names what it lacks."""
    assert _examined().cell("bpf", expected=False).works is None
    assert _examined().cell("bpf", expected=True) == Cell(works=False, text="NOT USABLE: bpf(2)")


def test_a_guest_that_never_answered_works_nowhere(tmp_path: Path) -> None:
    """Without any result no cell is taken to work, not even one that is not expected to."""
    silent = Examined.read("nobpf", tmp_path)

    assert columns([silent]) == [FALLBACK]
    assert silent.cell("bpf", expected=False).works is False
    assert silent.cell(FALLBACK, expected=True).works is False


def test_results_are_read_back(tmp_path: Path) -> None:
    """What the guest wrote is what the host reads."""
    (tmp_path / "check.json").write_text(json.dumps(_CHECK))
    (tmp_path / "release").write_text("6.1.1")
    (tmp_path / "plan.json").write_text(json.dumps(_PLAN))
    listing = [dataclasses.asdict(outcome) for outcome in (_TESTS, _DEMO)]
    (tmp_path / "steps.json").write_text(json.dumps(listing))

    read = Examined.read("nobpf", tmp_path)

    assert (read.release, read.plan, read.outcomes) == ("6.1.1", _PLAN, [_TESTS, _DEMO])
    assert columns([read]) == ["bpf", "iptables", FALLBACK]


def test_the_table_and_the_page() -> None:
    """Both show every cell; the page also says what is missing and what is used instead."""
    one = _examined(_TESTS, _DEMO)
    cells = {"nobpf": {name: one.cell(name, expected=False) for name in columns([one])}}

    lines = table(cells).splitlines()
    page = document([one], cells)

    assert lines[0].split() == ["kernel", "bpf", "iptables", "fallback"]
    assert "8/8 tests, demo" in lines[1]
    assert "| nobpf | 6.1.1 | not there, and refused | 8/8 tests, demo |" in page
    assert "✘ `bpf` bpf(2): Function not implemented; instead: --backend iptables" in page


@pytest.mark.parametrize(("has_bpf", "denied"), [(True, True), (False, False)])
def test_the_fallback_is_examined_everywhere(*, has_bpf: bool, denied: bool) -> None:
    """Every examination ends with --backend auto without bpf(2), denied where there is one."""
    *_, last = steps(["iptables"], has_bpf=has_bpf, extent=Extent.CORE)

    assert last.backend == FALLBACK
    assert ("--without-bpf" in last.command) == denied


def test_the_core_has_two_demos() -> None:
    """Every backend is tested, but the demo is what `auto` takes with bpf(2) and without."""
    core = steps(["bpf", "nftables", "iptables"], has_bpf=True, extent=Extent.CORE)

    assert [(step.backend, step.what) for step in core] == [
        ("bpf", "tests"),
        ("bpf", "demo"),
        ("nftables", "tests"),
        ("iptables", "tests"),
        (FALLBACK, "demo"),
    ]
