"""What is examined on each kernel: by the host to know it, by the guest to do it.

The guest runs `python -m vagrant.testbed.examination` on the checkout. `plan.json` in $RESULTS says
what it is going to do; each step leaves its output there, and `steps.json` is written anew after
each, so that an examination cut short still says what it found, and what it did not come to.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from .selection import BACKENDS, Extent, arguments

FALLBACK = "fallback"
# An emulated CPU is 10 to 20 times slower than the one the tests' own limits were chosen for.
# Waiting ends when the awaited thing is there: patience costs a failure time, and nothing else.
_PATIENCE = "20"
_STEP_SECONDS = 3600
_LINES_OF_A_FAILURE = 60
# Fewer than --maxfail, so that all others did run.
_MOST_TRIED_AGAIN = 2


@dataclass(frozen=True)
class Step:
    """One command of the examination; `what` is check, tests or demo."""

    backend: str
    what: str
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.what}-{self.backend}" if self.backend else self.what


@dataclass(frozen=True)
class Outcome:
    """How a step ended. Counts are those of its tests, 0 where it has none.

    `again` of those that passed did so at the second attempt only.
    """

    backend: str
    what: str
    code: int
    seconds: float
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    again: int = 0


def steps(backends: Sequence[str], *, has_bpf: bool, extent: Extent) -> Iterator[Step]:
    """What to do on a kernel where `check` says that these backends work.

    `fallback` is `--backend auto` without bpf(2): denied by seccomp, where the kernel has it. The
    core has two demos, or one: what `auto` takes with bpf(2) and without.
    """
    python = (sys.executable, "-m")
    for backend in backends:
        yield Step(backend, "tests", (*python, *_pytest(backend, extent)))
        if extent is not Extent.CORE or backend == "bpf":
            yield Step(backend, "demo", (*python, "examples.demo", "--backend", backend))
    deny = ("--without-bpf",) if has_bpf else ()
    yield Step(FALLBACK, "demo", (*python, "examples.demo", "--backend", "auto", *deny))


def _pytest(backend: str, extent: Extent) -> list[str]:
    limits = ["-o", "timeout=1800", "-o", "faulthandler_timeout=1700", "--tb=short"]
    report = f"--junitxml={_results() / f'tests-{backend}.xml'}"
    return ["pytest", "-q", *limits, report, *arguments(backend, extent)]


def _results() -> Path:
    return Path(os.environ.get("RESULTS", "/results"))


def _run(step: Step) -> Outcome:
    log = _results() / f"{step.name}.log"
    environment = {**os.environ, "PYAMBIENT_TEST_PATIENCE": _PATIENCE}
    began = time.monotonic()
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                step.command,
                stdout=output,
                stderr=output,
                env=environment,
                check=False,
                timeout=_STEP_SECONDS,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    seconds = round(time.monotonic() - began, 1)
    counts = _counts(_results() / f"{step.name}.xml")
    return Outcome(step.backend, step.what, code, seconds, **counts)


def examine(step: Step) -> Outcome:
    """Run a step, and once more the one or two tests of it that fail.

    On an emulated CPU a deadline of the product's own (10 s for a handshake) can pass where
    nothing is wrong. What is wrong fails twice.
    """
    first = _run(step)
    if step.what != "tests" or not 0 < first.failed <= _MOST_TRIED_AGAIN:
        return first
    name = f"{step.backend}-again"
    report = f"--junitxml={_results() / f'tests-{name}.xml'}"
    second = _run(Step(name, step.what, (*step.command, report, "--last-failed")))
    if second.code or second.passed != first.failed:
        return first
    return dataclasses.replace(
        first,
        code=0,
        seconds=round(first.seconds + second.seconds, 1),
        passed=first.passed + second.passed,
        failed=0,
        again=second.passed,
    )


def _counts(report: Path) -> dict[str, int]:
    if not report.exists():
        return {}
    suite = next(ET.parse(report).iter("testsuite")).attrib  # noqa: S314 - pytest wrote it
    failed = int(suite["failures"]) + int(suite["errors"])
    skipped = int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    return {"passed": passed, "failed": failed, "skipped": skipped}


def main(extent: Extent) -> int:
    """Examine this kernel; 0 if every step went well."""
    check = subprocess.run(
        [sys.executable, "-m", "pyambient", "check", "--output=json"],
        capture_output=True,
        text=True,
        check=False,
    )
    (_results() / "check.json").write_text(check.stdout or "{}")
    (_results() / "release").write_text(os.uname().release)
    sys.stdout.write(check.stderr)
    works = json.loads(check.stdout or "{}").get("backends", {})
    usable = [name for name in BACKENDS if works.get(name)]
    plan = list(steps(usable, has_bpf=_has_bpf(), extent=extent))
    (_results() / "plan.json").write_text(json.dumps([(step.backend, step.what) for step in plan]))
    outcomes: list[Outcome] = []
    for step in plan:
        outcomes.append(examine(step))
        listing = [dataclasses.asdict(outcome) for outcome in outcomes]
        (_results() / "steps.json").write_text(json.dumps(listing, indent=2))
        sys.stdout.write(f"{told(outcomes[-1])}\n")
        if outcomes[-1].code:
            sys.stdout.write(_end_of(step))
        sys.stdout.flush()
    return int(not outcomes or any(outcome.code for outcome in outcomes))


def _end_of(step: Step) -> str:
    """The last lines of the step's log, where demo and pytest say what went wrong."""
    lines = (_results() / f"{step.name}.log").read_text(errors="replace").splitlines()
    return "".join(f"    {line}\n" for line in lines[-_LINES_OF_A_FAILURE:])


def _has_bpf() -> bool:
    """The directory for bpffs comes with CONFIG_BPF_SYSCALL (kernel/bpf/inode.c)."""
    return Path("/sys/fs/bpf").is_dir()


def told(outcome: Outcome) -> str:
    """One line for people."""
    counts = f", {outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped"
    counts += f", {outcome.again} at the second attempt" if outcome.again else ""
    verdict = "ok" if not outcome.code else f"FAILED ({outcome.code})"
    return (
        f"{outcome.backend} {outcome.what}: {verdict}"
        f"{counts if outcome.what == 'tests' else ''}, {outcome.seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main(Extent(sys.argv[1])))
