"""Proving that a pod is captured: what is installed, and what happens to real connections."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from pyambient.children import module
from pyambient.errors import PyambientError
from pyambient.intercept.bpf_steps import SkLookup
from pyambient.intercept.interface import Pod
from pyambient.intercept.listeners import held_sockets, listening
from pyambient.intercept.runner import verify as verify_steps
from pyambient.intercept.survey import survey
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import HBONE_PORT, RESOLVER_PORT
from pyambient.netns import Netns

from . import inbound_trial
from .departures import TARGETS
from .inbound_trial import Entrance
from .records import Record, State

_PROBE_TIMEOUT: Final = 30.0
_REPAIR: Final = (
    "the agent repairs what it finds within 5 s, see its log; if it stays, unenroll the pod and "
    "enroll it again"
)
_SERVE: Final = "see with 'pyambient status' whether a proxy serves the pod"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked; `problem` is empty when it is as it should be.

    `then` is what to do about it: a phrase, as in PyambientError.
    """

    what: str
    problem: str = ""
    then: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem


def verify(record: Record, netns: Netns, proxies: Collection[int]) -> list[Check]:
    """Check everything an enrolment promises; some checks send something inside the pod.

    `proxies` are the pids of those that serve the pod, 0 for one in another pid namespace.
    """
    checks = [_state(record), *_steps(record, netns), *_listeners(record, netns, proxies)]
    families = _families(record)
    if not families:
        nothing = "it has none, so nothing can be tried"
        return [*checks, Check("the pod has an address", nothing, "give it one")]
    return [*checks, *_outbound(record, netns, families), *_inbound(record, netns, families)]


def _judged(what: str, problem: str) -> Check:
    """A trial as a check: a connection that is refused is safe, and wants a proxy."""
    if not problem:
        return Check(what)
    return Check(what, problem, _SERVE if _is_refusal(problem) else _REPAIR)


def _is_refusal(problem: str) -> bool:
    return any(word in problem for word in ("refused", "not permitted", "nobody"))


@dataclass(frozen=True, slots=True)
class _Trial:
    """What `agent.probe` is asked to do: a kind that it knows, and a family."""

    kind: str
    family: str

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.family}"

    @property
    def what(self) -> str:
        if self.kind == "TCP":
            return f"an {self.family} connection of an app reaches the proxy"
        return f"{self.kind} of an app reaches the proxy by {self.family}"

    def left_out(self, record: Record) -> str:
        """Why it is not made; empty if it is."""
        target = TARGETS[self.family]
        port = target.port if self.kind == "TCP" else RESOLVER_PORT
        if record.options.outbound.captures(target.ip, port):
            return ""
        return f"{target.ip}:{port} is excluded, so {self.family} was not tried"


def _outbound(record: Record, netns: Netns, families: Iterable[str]) -> Iterator[Check]:
    kinds = ("TCP", "DNS over UDP", "DNS over TCP") if record.options.dns else ("TCP",)
    trials = [_Trial(kind, family) for kind in kinds for family in families]
    made = [trial.name for trial in trials if not trial.left_out(record)]
    answers = _probe(netns, record, made) if made else {}
    for trial in trials:
        if trial.name in answers:
            yield _judged(trial.what, answers[trial.name] or "")
        else:
            yield Check(trial.left_out(record))
    if not record.options.dns:
        yield Check("DNS is not captured, as the pod's options say, and was not tried")


def _inbound(record: Record, netns: Netns, families: Iterable[str]) -> Iterator[Check]:
    network = survey(netns)
    found = {family: network.primary(ipv6=family == "IPv6") for family in families}
    devices = {address.ip: address.device for address in network.addresses}
    for ip in filter(None, found.values()):
        entrance = Entrance(netns, ip, devices[ip])
        yield _hbone_inbound(record, entrance)
        yield _plain_inbound(record, entrance)


def _hbone_inbound(record: Record, entrance: Entrance) -> Check:
    what = f"an {entrance.family} connection from outside to port {HBONE_PORT} is the proxy's"
    own = SocketAddress(entrance.ip, HBONE_PORT)
    return _arrives(_Arrival(what, "HBONE by", own, record.ports.hbone), record, entrance)


class _Arrival(NamedTuple):
    """What is checked of a connection to `own`: that `listener` gets it. `kind` is for people."""

    what: str
    kind: str
    own: SocketAddress
    listener: int


def _arrives(arrival: _Arrival, record: Record, entrance: Entrance) -> Check:
    own, listener = arrival.own, arrival.listener
    if _is_steered(record) or own.port == listener:
        return _judged(arrival.what, inbound_trial.steered(entrance, own, listener))
    if not inbound_trial.can_knock(entrance):
        return _cannot_knock(entrance, arrival.kind)
    return _judged(arrival.what, inbound_trial.redirected(entrance, own, listener))


def _is_steered(record: Record) -> bool:
    """Whether sk_lookup decides who gets a connection, not netfilter."""
    return any(isinstance(step, SkLookup) for step in record.steps)


def _cannot_knock(entrance: Entrance, kind: str) -> Check:
    return Check(
        f"{entrance.device} has no veth on this node, so {kind} {entrance.family} was not"
        " tried; connect to the pod from another one and look at the access log"
    )


def _plain_inbound(record: Record, entrance: Entrance) -> Check:
    what = f"an {entrance.family} connection from outside reaches the proxy"
    if record.options.bypass_inbound:
        return Check(f"inbound capture is bypassed, so plain {entrance.family} was not tried")
    if not record.options.inbound.captures(entrance.client.ip, entrance.own.port):
        client, own = entrance.client.ip, entrance.own
        return Check(f"what comes from {client} to {own} is excluded, so it was not tried")
    return _arrives(_Arrival(what, "plain", entrance.own, record.ports.inbound), record, entrance)


def _listeners(record: Record, netns: Netns, proxies: Collection[int]) -> Iterator[Check]:
    """Whether it is the proxy that has the proxy's ports: not every backend can keep them."""
    what = "the listeners in the pod are the proxy's"
    if not proxies:
        yield Check(what, "no proxy is connected to the agent", "start one, 'pyambient up' does")
    elif 0 not in proxies:
        held = held_sockets(proxies)
        others = {p for p, inode in listening(netns) if p in record.ports and inode not in held}
        ports = " ".join(map(str, sorted(others)))
        problem = f"somebody else listens on {ports}" if ports else ""
        yield Check(what, problem, "see with 'ss -ltnp' in the pod who it is" if ports else "")


def _state(record: Record) -> Check:
    what = f"the pod is enrolled ({record.backend})"
    if record.state is State.ENROLLED:
        return Check(what)
    return Check(what, f"it is {record.state.value}", "wait, and look at 'pyambient status'")


def _steps(record: Record, netns: Netns) -> Iterator[Check]:
    problems = verify_steps(Pod(record.pod.uid, netns), record.steps)
    if not problems:
        yield Check(f"all {len(record.steps)} steps of the enrolment are in place")
    for problem in problems:
        yield Check("a step of the enrolment is in place", problem, _REPAIR)


def _families(record: Record) -> list[str]:
    has = {"IPv6" if ":" in ip else "IPv4" for ip in record.addresses}
    return sorted(has)


def _probe(netns: Netns, record: Record, trials: list[str]) -> dict[str, str | None]:
    """Run `agent.probe` in the pod: {trial: why it was not captured, or None}."""
    with _place(record.cgroup) as place:
        ports = ",".join(map(str, record.ports))
        command = module("pyambient.agent.probe", str(netns.fd), place, ports, *trials)
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
