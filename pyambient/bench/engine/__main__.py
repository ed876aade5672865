"""`make bench-engine`: measure, print the table, write the raw numbers; see docs/performance.md."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pyambient.bench.load import build
from pyambient.bench.report import machine, write_json
from pyambient.bench.rounds import Results, turns
from pyambient.bench.walls import behind_walls, options_of

from .bed import Node
from .rows import ROWS
from .scenarios import MEMORY, crowd, hostility, memory, share
from .subjects import ENVOY, OURS, OURS_16K, OURS_UNSHARED, Subject
from .table import render
from .work import ROUND, Work

_MODULE = "pyambient.bench.engine"
_SUBJECTS = (OURS, OURS_16K, ENVOY)


def _parser() -> argparse.ArgumentParser:
    parser = options_of(_MODULE, __doc__, seconds=2.0)
    parser.add_argument("--backend", default="bpf", help="what captures, for Envoy too")
    parser.add_argument("--only", default="", help="only work whose name contains this")
    parser.add_argument("--idle", type=int, default=10_000, help="connections in the crowd")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--check", action="store_true", help="exit 1 if a row falls short")
    return parser


def _measure(options: argparse.Namespace) -> Results:
    """All rounds of all work."""
    program = build(options.out.absolute())
    cpus = sorted(os.sched_getaffinity(0))
    node = Node(options.inside, options.backend, (cpus[0], cpus[-1]))
    subjects = {name: Subject(node, name, program) for name in _SUBJECTS}
    results = Results()
    try:
        if not options.only:
            _memory(node, subjects, program, results)
        for order in turns(_SUBJECTS, options.rounds):
            _round([subjects[name] for name in order], options, results)
            if not options.only:
                share(subjects[OURS], options.seconds, results)
                hostility(subjects[OURS], options.seconds, results)
        if not options.only:
            crowd(subjects[OURS], options.idle, options.seconds, results)
    finally:
        for subject in subjects.values():
            subject.end()
    return results


def _memory(node: Node, subjects: dict[str, Subject], program: Path, results: Results) -> None:
    """Before anything else has run: a process does not give back all that it once needed."""
    unshared = Subject(node, OURS_UNSHARED, program)
    for subject in (subjects[OURS], unshared, subjects[ENVOY]):
        results.add(MEMORY, subject.name, memory(subject))
    unshared.end()


def _round(subjects: list[Subject], options: argparse.Namespace, results: Results) -> None:
    for work in ROUND:
        if options.only in work.name:
            _one(work, subjects, options.seconds, results)


def _one(work: Work, subjects: list[Subject], seconds: float, results: Results) -> None:
    for subject in subjects:
        if subject.name in work.subjects:
            sample = subject.measure(work.kind, work.port, work.at_once, seconds)
            results.add(work.name, subject.name, sample)
            sys.stderr.write(".")
            sys.stderr.flush()


def _inside(options: argparse.Namespace) -> int:
    results = _measure(options)
    sys.stderr.write("\n")
    sys.stdout.write(render(ROWS, results))
    settings = {"rounds": options.rounds, "seconds": options.seconds, "backend": options.backend}
    content = {"machine": machine(), "settings": settings, "samples": results.samples}
    write_json(options.out / "engine.json", content)
    short = [row.name for row in ROWS if row.short(results)]
    if options.check and short:
        sys.stderr.write(f"bench-engine: {len(short)} rows fall short: {'; '.join(short)}\n")
        return 1
    return 0


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    return behind_walls(_MODULE, arguments, options.inside, lambda: _inside(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
