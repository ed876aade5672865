"""What `pyambient bench intercept` runs behind its walls: cells, crowds, enrolments, the file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pyambient.bench.walls import settle_inside
from pyambient.errors import PyambientError

from . import plan
from .bars import BARS
from .bed import Node
from .cell import Tools, measure
from .crowd import Crowd
from .enrolling import Mesh, latencies
from .plan import Group
from .samples import Samples
from .settings import Settings
from .table import label, render, verdicts
from .work import enrolling


class _Run:
    """One run of the benchmark; what it has is on disk after each group of cells."""

    def __init__(self, settings: Settings, cgroup: Path, bar: Progress) -> None:
        self.settings = settings
        self.samples = Samples(settings)
        self._cgroup = cgroup
        self._node = Node(cgroup, max(os.sched_getaffinity(0)))
        self._tools = Tools.built(settings.directory)
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def everything(self) -> None:
        settings = self.settings
        rounds = [plan.shuffled(plan.traffic(settings), n) for n in range(settings.rounds)]
        self._cells("traffic", [group for groups in rounds for group in groups])
        for backend in settings.backends if settings.pods else ():
            self._crowd(backend)
        for backend in settings.backends if settings.places else ():
            self._enrolments(backend)

    def _begin(self, total: int) -> None:
        self._bar.reset(self._task, total=total)

    def _say(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def _cells(self, part: str, groups: Iterable[Group]) -> None:
        groups = list(groups)
        self._begin(sum(map(len, groups)))
        for group in groups:
            measured = []
            for cell in group:
                self._say(f"{part}: {label(cell.subject.name)}, {cell.row}")
                sample = measure(cell, self._node, self._tools, self.settings.seconds)
                measured.append((cell.row, cell.subject.name, sample))
                self._bar.advance(self._task)
            self.samples.add(measured)

    def _crowd(self, backend: str) -> None:
        """The cost of one pod while more and more are enrolled."""
        try:
            for count in self.settings.pods:
                self._begin(count - 1)
                for others in self._node.enrol_others(count - 1, backend):
                    self._say(f"enrolling {count - 1} other pods by {backend}")
                    self._bar.update(self._task, completed=others)
                group = plan.crowded(backend, count)
                rounds = [plan.shuffled([group], n)[0] for n in range(self.settings.rounds)]
                self._cells(f"{count} pods", rounds)
        finally:
            self._node.free_others()

    def _enrolments(self, backend: str) -> None:
        """How long an enrolment takes."""
        crowd = Crowd()
        mesh = Mesh(self._node.work / f"mesh-{backend}", self._cgroup, backend)
        try:
            for place in self.settings.places:
                self._begin(self.settings.times)
                self._say(f"enrolling pod {place} by {backend}")
                for sample in latencies(mesh, crowd, place, self.settings.times):
                    self.samples.add([(enrolling(place), backend, sample)])
                    self._bar.advance(self._task)
            self._say(f"freeing the pods of {backend}")
            for pod in crowd.pods:
                mesh.free(pod)
        finally:
            mesh.end()
            crowd.close()


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description:<48}"),
        *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
    )
    return Progress(*columns, console=Console(stderr=True))


def _inside(settings: Settings, cgroup: Path) -> int:
    settle_inside()
    with _progress() as bar:
        run = _Run(settings, cgroup, bar)
        run.everything()
    results = run.samples.results
    sys.stdout.write(f"{render(results)}\n{verdicts(results)}")
    short = [row.name for row in BARS if row.short(results)]
    if settings.check and short:
        sys.stderr.write(f"bench intercept: {len(short)} bars fall short: {'; '.join(short)}\n")
        return 1
    return 0


def main(text: str, cgroup: str) -> int:
    try:
        return _inside(Settings.of_text(text), Path(cgroup))
    except PyambientError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[3]))
