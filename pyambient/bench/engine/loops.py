"""Which of the two hosts the other: `python -m pyambient.bench.engine.loops`.

The byte path's epoll with trio as its guest, as the product has it, against the same epoll in a
trio task. Both are whole proxies on two nodes, as in `make bench-engine`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pyambient.bench.load import build
from pyambient.bench.markdown import number, table
from pyambient.bench.rounds import Results, turns
from pyambient.bench.walls import behind_walls, options_of

from . import work
from .bed import Node
from .subjects import OURS, OURS_NESTED, Subject

_MODULE = "pyambient.bench.engine.loops"
_FIGURES = (
    (work.CONNECTIONS_16, "CPU, µs", work.cpu_per_operation),
    (work.CONNECTIONS_64, "CPU, µs", work.cpu_per_operation),
    (work.TRIPS, "CPU, µs", work.cpu_per_operation),
    (work.LONE, "CPU, µs", work.cpu_per_operation),
    (work.LONE, "p50, µs", work.median_latency),
    (work.UPLOAD, "Gbit/CPU-s", work.gigabits_per_cpu_second),
    (work.DOWNLOADS, "Gbit/CPU-s", work.gigabits_per_cpu_second),
)


def _measure(options: argparse.Namespace) -> Results:
    program = build(Path("build/bench").absolute())
    cpus = sorted(os.sched_getaffinity(0))
    node = Node(options.inside, "bpf", (cpus[0], cpus[-1]))
    subjects = {name: Subject(node, name, program) for name in (OURS, OURS_NESTED)}
    results = Results()
    try:
        for order in turns(tuple(subjects), options.rounds):
            for done in dict.fromkeys(done for done, _, _ in _FIGURES):
                for name in order:
                    words = (done.kind, done.port, done.at_once, options.seconds)
                    results.add(done.name, name, subjects[name].measure(*words))
    finally:
        for subject in subjects.values():
            subject.end()
    return results


def _render(results: Results) -> str:
    rows = []
    for done, unit, value in _FIGURES:
        guest, nested = (results.median(done.name, n, value) for n in (OURS, OURS_NESTED))
        ratio = results.ratio(done.name, OURS_NESTED, OURS, value)
        rows.append((f"{done.name}: {unit}", *map(number, (guest, nested, ratio))))
    return table(("work", "trio is the guest", "trio is the host", "ratio"), rows)


def _print(options: argparse.Namespace) -> int:
    sys.stdout.write(_render(_measure(options)))
    return 0


def main(arguments: list[str]) -> int:
    parser = options_of(_MODULE, __doc__, seconds=1.0)
    options = parser.parse_args(arguments)
    return behind_walls(_MODULE, arguments, options.inside, lambda: _print(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
