"""How `trace` names pods, what it prints, and whom it cannot trace."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pyambient.agent.config import RunDir
from pyambient.agent.records import NetnsRef, Record, RecordStore, State
from pyambient.agent.trace import PodNames, Trace
from pyambient.agent.traced import Traced
from pyambient.errors import UsageError
from pyambient.intercept.bpf_steps import OwnAddress
from pyambient.intercept.trace_event import Event
from pyambient.model.address import SocketAddress
from pyambient.model.workload import PodRef

_EVENT = Event(
    netns=7,
    at=0,
    decision="captured",
    reason="",
    direction="outbound",
    protocol="tcp",
    source=None,
    destination=SocketAddress("10.77.0.3", 8080),
    listener=15001,
    hook="connect",
    pid=4711,
    process="curl",
)
_MOMENT = datetime(2026, 11, 29, 10, 42, 51, 123456, UTC)
_FROM = SocketAddress("10.77.0.2", 40000)
_NOBODY = {"pid": 0, "process": ""}


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({}, "captured outbound tcp > 10.77.0.3:8080, to 15001 (connect, curl 4711)"),
        (
            {"source": _FROM, "hook": "redirect", **_NOBODY},
            "captured outbound tcp 10.77.0.2:40000 > 10.77.0.3:8080, to 15001 (redirect)",
        ),
        (
            {"decision": "delivered", "direction": "inbound", "listener": 0}
            | {"source": SocketAddress("10.77.0.2", 0)},
            "delivered inbound tcp 10.77.0.2 > 10.77.0.3:8080 (connect, curl 4711)",
        ),
        (
            {"decision": "refused", "reason": "no listener"},
            "refused outbound tcp > 10.77.0.3:8080: nobody listens on 15001 (connect, curl 4711)",
        ),
        (
            {"decision": "refused", "reason": "99", "listener": 0},
            "refused outbound tcp > 10.77.0.3:8080: 99 (connect, curl 4711)",
        ),
        (
            {"decision": "dropped", "reason": "captured", "listener": 0, "source": _FROM}
            | {"destination": SocketAddress("fd77::3", 80), "hook": "guard", **_NOBODY},
            "dropped outbound tcp 10.77.0.2:40000 > [fd77::3]:80: of a captured connection (guard)",
        ),
        (
            {"process": '"\x1b[2J'},
            'captured outbound tcp > 10.77.0.3:8080, to 15001 (connect, "\\"\\u{1b}[2J" 4711)',
        ),
    ],
)
def test_a_line(changed: dict[str, object], line: str) -> None:
    """Time, pod, decision, ends, why, and by whom; a process' name is nothing to trust."""
    traced = Traced(replace(_EVENT, **changed), _MOMENT, "shop", "default/shop")
    assert str(traced) == f"2026-11-29T10:42:51.123456Z default/shop {line}"


def test_the_json_twin() -> None:
    """What is not known is null."""
    traced = Traced(replace(_EVENT, pid=0, process=""), _MOMENT, "shop", "default/shop-1")
    assert traced.to_json() == {
        "time": "2026-11-29T10:42:51.123456Z",
        "netns": "shop",
        "pod": "default/shop-1",
        "decision": "captured",
        "reason": None,
        "direction": "outbound",
        "protocol": "tcp",
        "source": None,
        "destination": "10.77.0.3:8080",
        "listener": 15001,
        "hook": "connect",
        "pid": None,
        "process": None,
    }


def _record(uid: str, name: str, cookie: int, backend: str = "bpf") -> Record:
    netns = NetnsRef(f"/run/netns/{name}", 4, cookie, None)
    steps = (OwnAddress("/sys/fs/bpf/pyambient", cookie, "10.0.0.2"),)
    pod = PodRef(uid, name, "default", name)
    return Record(pod, netns, backend, State.ENROLLED, steps if backend == "bpf" else ())


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    run_dir = RunDir(tmp_path)
    run_dir.prepare()
    return RecordStore(run_dir.pods)


def test_names_follow_the_records(tmp_path: Path, store: RecordStore) -> None:
    """A pod that has been freed keeps its name, for its last events; others get theirs at once."""
    store.write(_record("u1", "shop", 7))
    names = PodNames(RunDir(tmp_path))
    assert names.of(7) == ("shop", "default/shop")
    assert names.of(8) == ("cookie:8", "cookie:8")
    store.remove("u1")
    store.write(_record("u2", "db", 8))
    (tmp_path / "pods" / "bad.json").write_text("{")
    names.refresh()
    assert (names.of(7), names.of(8)) == (("shop", "default/shop"), ("db", "default/db"))
    assert [record.pod.name for record in names.records] == ["db"]
    store.write(_record("u3", "web", 8))
    store.remove("u2")
    names.refresh()
    assert names.of(8) == ("web", "default/web")


def test_names_of_pods_that_are_gone_are_bounded(
    tmp_path: Path, store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was enrolled last is known longest."""
    monkeypatch.setattr("pyambient.agent.trace.MOST_NAMES", 2)
    names = PodNames(RunDir(tmp_path))
    for cookie in (7, 8, 9):
        store.write(_record("u1", f"pod{cookie}", cookie))
        names.refresh()
        store.remove("u1")
        names.refresh()
    known = [names.of(cookie)[1] for cookie in (7, 8, 9)]
    assert known == ["cookie:7", "default/pod8", "default/pod9"]


def test_a_backend_that_tells_nothing(tmp_path: Path, store: RecordStore) -> None:
    """Is refused by name, and named where all pods are traced."""
    store.write(_record("u1", "shop", 7))
    store.write(_record("u2", "db", 8, "nftables"))
    with pytest.raises(UsageError, match=r"db has backend nftables, .*; ask 'pyambient explain'"):
        Trace(RunDir(tmp_path), "db", print)
    assert Trace(RunDir(tmp_path), None, print).untraced() == ["default/db"]


def test_who_is_not_enrolled(tmp_path: Path) -> None:
    """As every other command says it."""
    own = f"pid:{os.getpid()}"
    with pytest.raises(UsageError, match=f"{own} is not enrolled"):
        Trace(RunDir(tmp_path), own, print)
