"""Proving that a pod is captured: what is installed, and what happens to a real connection."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyambient.errors import PyambientError
from pyambient.intercept.interface import Pod
from pyambient.intercept.runner import verify as verify_steps
from pyambient.netns import Netns

from .probe import TARGETS
from .records import Record, State

_PROBE_TIMEOUT: Final = 20.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked; `problem` is empty when it is as it should be."""

    what: str
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem


def verify(record: Record, netns: Netns) -> list[Check]:
    """Check everything an enrolment promises; some checks connect from inside the pod."""
    checks = [_state(record), *_steps(record, netns)]
    families = _families(record)
    if not families:
        return [*checks, Check("the pod has an address", "it has none, so nothing can be tried")]
    tried = [family for family in families if _is_captured(record, family)]
    answers = _probe(netns, record.cgroup, tried) if tried else {}
    return checks + [
        Check(f"an {family} connection of an app reaches the proxy", answers[family] or "")
        if family in tried
        else Check(f"{TARGETS[family][0]} is excluded, so {family} was not tried")
        for family in families
    ]


def _is_captured(record: Record, family: str) -> bool:
    target, _ = TARGETS[family]
    return record.options.outbound.captures(target.ip, target.port)


def _state(record: Record) -> Check:
    problem = "" if record.state is State.ENROLLED else f"it is {record.state.value}"
    return Check(f"the pod is enrolled ({record.backend})", problem)


def _steps(record: Record, netns: Netns) -> Iterator[Check]:
    problems = verify_steps(Pod(record.pod.uid, netns), record.steps)
    if not problems:
        yield Check(f"all {len(record.steps)} steps of the enrolment are in place")
    for problem in problems:
        yield Check("a step of the enrolment is in place", problem)


def _families(record: Record) -> list[str]:
    has = {"IPv6" if ":" in ip else "IPv4" for ip in record.addresses}
    return sorted(has)


def _probe(netns: Netns, cgroup: str | None, families: list[str]) -> dict[str, str | None]:
    """Run `agent.probe` in the pod: {family: why it was not captured, or None}."""
    with _place(cgroup) as place:
        command = [sys.executable, "-m", "pyambient.agent.probe", str(netns.fd), place, *families]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=True,
                timeout=_PROBE_TIMEOUT,
                pass_fds=(netns.fd,),
            )
        except subprocess.TimeoutExpired:
            raise PyambientError("the probe inside the pod does not end") from None
        except subprocess.CalledProcessError as error:
            reason = error.stderr.strip().rpartition("\n")[2]
            raise PyambientError(f"the probe inside the pod failed: {reason}") from None
    answers: dict[str, str | None] = json.loads(done.stdout)
    return answers


@contextlib.contextmanager
def _place(cgroup: str | None) -> Iterator[str]:
    """A cgroup for the probe below the one whose connects are hooked; "" where there is none.

    Its own, because a cgroup that hands controllers on to its children takes no processes.
    """
    if cgroup is None:
        yield ""
        return
    try:
        place = tempfile.mkdtemp(prefix="pyambient-verify-", dir=cgroup)
    except OSError as error:
        raise PyambientError(f"no cgroup can be made in {cgroup}: {error.strerror}") from None
    try:
        yield place
    finally:
        Path(place).rmdir()
