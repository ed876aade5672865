"""What the examinations found, as a table and as docs/kernels.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .examination import FALLBACK, Outcome
from .selection import BACKENDS


def columns(examined: Sequence[Examined]) -> list[str]:
    """The backends that `pyambient check` knows, and the fallback."""
    known = {name for one in examined for name in one.check.get("backends", {})}
    return [*(name for name in BACKENDS if name in known), FALLBACK]


@dataclass(frozen=True)
class Cell:
    """One kernel with one backend. `works` is None where the kernel is not meant to have it."""

    works: bool | None
    text: str


@dataclass(frozen=True)
class Examined:
    """What came back from the guest with one kernel."""

    kernel: str
    release: str
    check: Mapping[str, Any]
    plan: Sequence[tuple[str, str]]
    """(backend, step) of all that was to be done."""
    outcomes: Sequence[Outcome]

    @classmethod
    def read(cls, kernel: str, folder: Path) -> Examined:
        """Read a results folder; files that never came back count as empty."""

        def text(name: str) -> str:
            path = folder / name
            return path.read_text() if path.exists() else ""

        check = json.loads(text("check.json") or "{}")
        plan = [(backend, what) for backend, what in json.loads(text("plan.json") or "[]")]
        outcomes = [Outcome(**item) for item in json.loads(text("steps.json") or "[]")]
        return cls(kernel, text("release"), check, plan, outcomes)

    def cell(self, column: str, *, expected: bool) -> Cell:
        """The verdict: every step of the column ran, and ended well."""
        mine = [outcome for outcome in self.outcomes if outcome.backend == column]
        if not mine:
            why = self._missing(column)
            if not expected and why:
                return Cell(None, "not there, and refused")
            return Cell(False, f"NOT USABLE: {why}" if why else "DID NOT RUN")
        done = [outcome.what for outcome in mine]
        left = [what for backend, what in self.plan if backend == column and what not in done]
        told = [*map(_told, mine), *(f"{what} DID NOT RUN" for what in left)]
        return Cell(not left and not any(outcome.code for outcome in mine), ", ".join(told))

    def _missing(self, backend: str) -> str:
        """The first needed feature that `check` did not find."""
        for item in self.check.get("checks", ()):
            if item["group"] == backend and item["needed"] and not item["present"]:
                return str(item["name"])
        return ""


def _told(outcome: Outcome) -> str:
    if outcome.what == "tests":
        total = outcome.passed + outcome.failed
        skipped = f" ({outcome.skipped} skipped)" if outcome.skipped else ""
        again = f" ({outcome.again} at the second attempt)" if outcome.again else ""
        return f"{outcome.passed}/{total} tests{skipped}{again}"
    return "demo" if not outcome.code else "demo FAILED"


def table(cells: Mapping[str, Mapping[str, Cell]]) -> str:
    """Kernel x backend x result, for a terminal."""
    rows = [["kernel", *next(iter(cells.values()))]]
    rows += [[kernel, *(cell.text for cell in mine.values())] for kernel, mine in cells.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def document(examined: Sequence[Examined], cells: Mapping[str, Mapping[str, Cell]]) -> str:
    """docs/kernels.md: per kernel what is used and what is missing."""
    head = ["kernel", "release", *next(iter(cells.values()))]
    lines = [_PREFACE, _row(head), _row(["---"] * len(head))]
    for one in examined:
        mine = cells[one.kernel]
        lines.append(_row([one.kernel, one.release, *(cell.text for cell in mine.values())]))
    for one in examined:
        lines += ["", f"## {one.kernel}", "", *_section(one)]
    return "\n".join(lines) + "\n"


_PREFACE = """\
# Kernels

Written by `make test-kernels` from what it found; every line was tried in a guest with that kernel
([vagrant/](../vagrant/README.md)). Whether a feature is there is asked by using it, never by a
version number: `pyambient check` asks the same questions on your machine.

`nobpf` is Linux 6.1 built without `CONFIG_BPF_SYSCALL`. Column `fallback` is `--backend auto`
where bpf(2) fails: on `nobpf` because there is none, on the others because seccomp denies it.
"""


def _section(one: Examined) -> list[str]:
    works = one.check.get("backends", {})
    usable = [backend for backend in BACKENDS if works.get(backend)]
    taken = f"`--backend auto` takes `{usable[0]}`." if usable else "No backend works."
    checks = [item for item in one.check.get("checks", ()) if not _is_of_the_guest(item)]
    lines = [f"Linux {one.release}. {taken}", ""]
    lines += [f"* ✔ {_group(item)}{item['name']}" for item in checks if item["present"]]
    lines += [
        f"* ✘ {_group(item)}{item['name']}: {_why(item)}" for item in checks if not item["present"]
    ]
    return lines


def _is_of_the_guest(item: Mapping[str, Any]) -> bool:
    """A guest has no compiler for `--bpf-loader bcc`, whatever its kernel."""
    return str(item["name"]).startswith("bcc ")


def _group(item: Mapping[str, Any]) -> str:
    return f"`{item['group']}` " if item["group"] in BACKENDS else ""


def _why(item: Mapping[str, Any]) -> str:
    return "; ".join(filter(None, (item["problem"], item["hint"])))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
