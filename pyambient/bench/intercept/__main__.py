"""What `pyambient bench intercept` runs behind its walls: rounds of cells, the table, the file."""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pyambient.bench.report import machine, write_json
from pyambient.bench.rounds import Results
from pyambient.bench.walls import settle_inside
from pyambient.errors import PyambientError

from .bed import Node
from .cell import Tools, measure
from .settings import Settings
from .table import label, render
from .work import ALL_WORK, Cell, cells, subjects


def _rounds(settings: Settings) -> Iterator[Cell]:
    """Every round has each cell once, in an order of its own."""
    work = [work for work in ALL_WORK if not settings.work or work.name in settings.work]
    chosen = list(cells(subjects(settings.backends, settings.enrolled), work))
    for number in range(settings.rounds):
        shuffled = chosen.copy()
        random.Random(number).shuffle(shuffled)  # noqa: S311 - an order, not a secret
        yield from shuffled


def _measure(settings: Settings, node: Node) -> Results:
    tools = Tools.built(settings.directory)
    results = Results()
    chosen = list(_rounds(settings))
    with _progress() as bar:
        task = bar.add_task("", total=len(chosen))
        for cell in chosen:
            bar.update(task, description=f"{label(cell.subject.name)}: {cell.row}")
            results.add(cell.row, cell.subject.name, measure(cell, node, tools, settings.seconds))
            bar.advance(task)
    return results


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description:<32}"),
        *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
    )
    return Progress(*columns, console=Console(stderr=True))


def _inside(settings: Settings, cgroup: Path) -> None:
    settle_inside()
    node = Node(cgroup, max(os.sched_getaffinity(0)))
    results = _measure(settings, node)
    sys.stdout.write(render(results))
    content = {
        "machine": machine(),
        "settings": dataclasses.asdict(settings),
        "samples": results.samples,
    }
    write_json(Path(settings.out), content)


def main(text: str, cgroup: str) -> int:
    try:
        _inside(Settings.of_text(text), Path(cgroup))
    except PyambientError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[3]))
