"""Records on disk: what is written is read back, and a file is whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

import pyambient.intercept.choose  # noqa: F401 - its backends' steps are in the records
from pyambient.agent.config import RunDir
from pyambient.agent.locate import find, in_use, path_of, record_of, refuse_enrolled
from pyambient.agent.records import NetnsRef, Record, RecordStore, State
from pyambient.errors import PyambientError, UsageError
from pyambient.intercept.fib import Route, Rule
from pyambient.intercept.sysctl import ReservedPorts, Sysctl
from pyambient.model.workload import PodRef
from pyambient.netns import Netns
from tests.bed import Bed

NETNS = NetnsRef("/run/netns/shop", 4, 4026532001, 17)
STEPS = (
    ReservedPorts(added=(15001, 15006)),
    Rule(ipv6=False),
    Route(ipv6=True, device="eth0", source="fd00::2", metric=200),
    Sysctl("net.ipv4.fwmark_reflect", "1", previous="0"),
)


def record(uid: str = "u1", name: str = "shop", **changes: Any) -> Record:
    pod = PodRef(uid, name, "default", "shop")
    made = Record(pod, NETNS, "bpf", State.ENROLLED, STEPS, ("10.0.0.2", "fd00::2"), "/cg")
    return made.changed(**changes)


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return RecordStore(tmp_path)


@pytest.mark.parametrize("state", State)
def test_a_record_comes_back_as_it_was_written(store: RecordStore, state: State) -> None:
    """Every field survives, what steps keep for their undoing included."""
    written = record(state=state, cgroup=None)
    store.write(written)
    (read,) = store.all()
    assert read == written
    assert [s.previous for s in read.steps if isinstance(s, Sysctl)] == ["0"]
    assert [s.added for s in read.steps if isinstance(s, ReservedPorts)] == [(15001, 15006)]


def test_records_are_sorted_and_private(store: RecordStore) -> None:
    """By namespace, name and uid; nobody else can read them."""
    for uid, name in (("u3", "b"), ("u2", "a"), ("u1", "a")):
        store.write(record(uid, name))
    assert [r.pod.uid for r in store.all()] == ["u1", "u2", "u3"]
    assert {path.stat().st_mode & 0o777 for path in store.directory.iterdir()} == {0o600}


def test_a_failed_write_leaves_the_record_before(
    store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle of a write changes nothing, and the rest of it is swept."""
    store.write(record())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space"):
            store.write(record(state=State.DRAINING))
    store.sweep()
    assert [path.name for path in store.directory.iterdir()] == ["u1.json"]
    assert store.all() == [record()]


def test_removing_is_idempotent(store: RecordStore) -> None:
    """A record that is gone already is no error."""
    store.write(record())
    store.remove("u1")
    store.remove("u1")
    assert store.all() == []


@pytest.mark.parametrize("uid", ["", "../u1", "a/b", ".hidden", "x" * 300])
def test_a_uid_stays_in_the_directory(store: RecordStore, uid: str) -> None:
    """A uid is a file name and nothing more."""
    with pytest.raises(PyambientError, match="uid"):
        store.write(record(uid))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 1}', '{"version": 99}', '{"version": 1, "pod": 3}', "\x00"],
)
def test_a_broken_file_names_itself_and_spares_the_others(store: RecordStore, text: str) -> None:
    """One unreadable record is one error line; the others are still read."""
    store.write(record())
    store.directory.joinpath("u0.json").write_text(text)
    records, (error,) = store.readable()
    assert records == [record()]
    assert str(store.directory / "u0.json") in str(error)
    with pytest.raises(PyambientError, match=r"u0\.json"):
        store.all()


def test_a_pod_freed_while_records_are_read_is_no_error(
    store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file was listed, and is gone when it is opened."""
    for uid in ("u1", "u2"):
        store.write(record(uid))
    listed = list(store.directory.glob("*.json"))
    store.remove("u1")
    monkeypatch.setattr(Path, "glob", lambda *_: iter(listed))
    assert [one.pod.uid for one in store.all()] == ["u2"]
    assert [one.pod.uid for one in store.readable()[0]] == ["u2"]
    assert store.readable()[1] == []


def test_an_unknown_step_says_upgrade(store: RecordStore) -> None:
    """A record of a later version is not misread."""
    store.write(record())
    path = store.directory / "u1.json"
    path.write_text(path.read_text().replace('"kind": "rule"', '"kind": "later"'))
    with pytest.raises(PyambientError, match="unknown step 'later'; upgrade pyambient"):
        store.all()


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/run/netns/shop", "shop"),
        ("/var/run/netns/shop", "shop"),
        ("/proc/17/ns/net", "pid:17"),
        ("/srv/ns/shop", "/srv/ns/shop"),
        ("/run/netns/a/b", "/run/netns/a/b"),
    ],
)
def test_a_label_is_what_people_call_it(path: str, label: str) -> None:
    """A label names the namespace and opens it again."""
    assert NetnsRef(path, 1, 2, None).label == label
    assert path_of(label) == path or path.startswith("/var")


def test_path_of_means_the_same_to_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths and file descriptors are made absolute where they are meant."""
    monkeypatch.chdir("/run")
    assert path_of("netns/shop") == "/run/netns/shop"
    assert path_of("./netns/../netns/shop") == "/run/netns/shop"
    assert path_of("fd:7") == f"/proc/{os.getpid()}/fd/7"


def test_a_namespace_is_found_by_path_then_by_process(bed: Bed) -> None:
    """Where it was; else through a process in it; a namespace in its place is not taken for it."""
    pod, other = bed.pod("one"), bed.pod("two")
    ref = NetnsRef.of(pod.netns, pod.path)
    moved = NetnsRef(other.path, ref.device, ref.inode, ref.cookie)
    with find(ref) or pytest.fail("not found") as found:
        assert found.key == pod.netns.key
    assert not in_use(moved)
    assert find(moved) is None
    sleeper = pod.spawn(lambda channel: channel.send("here") or channel.receive())
    assert sleeper.receive() == "here"
    with find(moved) or pytest.fail("not found") as found:
        assert found.key == pod.netns.key
    sleeper.kill()
    assert find(moved) is None


def test_a_reused_inode_is_another_namespace(bed: Bed) -> None:
    """Equal inode, other cookie: inode numbers are given out again, cookies are not."""
    pod = bed.pod("one")
    ref = NetnsRef.of(pod.netns, pod.path)
    impostor = NetnsRef(ref.path, ref.device, ref.inode, (ref.cookie or 0) + 1)
    assert find(impostor) is None


def test_the_record_of_a_namespace(bed: Bed) -> None:
    """By the path it was enrolled as, by any other path, and a usage error if there is none."""
    pod, other = bed.pod("one"), bed.pod("two")
    enrolled = record(netns=NetnsRef.of(pod.netns, pod.path))
    assert record_of([enrolled], "one") is enrolled
    assert record_of([enrolled], f"/proc/self/fd/{pod.netns.fd}") is enrolled
    with pytest.raises(UsageError, match="two is not enrolled"):
        record_of([enrolled], "two")
    with pytest.raises(UsageError, match="one is enrolled already, as default/shop"):
        refuse_enrolled([enrolled], pod.netns)
    refuse_enrolled([enrolled], other.netns)


def test_of_two_with_one_name_the_living_one_is_meant(bed: Bed) -> None:
    """A namespace that was replaced is still on record, for a second or two."""
    pod = bed.pod("one")
    gone = record("u0", netns=NetnsRef(pod.path, 1, 2, 3))
    living = record("u1", netns=NetnsRef.of(pod.netns, pod.path))
    assert record_of([gone, living], "one") is living
    assert record_of([gone], "one") is gone


def test_a_record_is_found_when_its_namespace_is_gone() -> None:
    """What is left of a pod can still be freed by its name."""
    gone = record(netns=NetnsRef("/run/netns/gone", 1, 2, 3))
    assert record_of([gone], "gone") is gone


def test_a_run_directory_is_roots_alone(tmp_path: Path) -> None:
    """It is made and kept at mode 0700, its records below it too."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.prepare()
    run_dir.path.chmod(0o755)
    run_dir.prepare()
    assert [p.stat().st_mode & 0o777 for p in (run_dir.path, run_dir.pods)] == [0o700, 0o700]


def test_a_run_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Whoever owns it could replace a record or a socket."""
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(PyambientError, match="not a directory of root's own"):
        RunDir(tmp_path).prepare()
    link = tmp_path / "link"
    link.symlink_to("/run")
    with pytest.raises(PyambientError, match="not a directory of root's own"):
        RunDir(link).prepare()


def test_a_run_directory_too_deep_for_sockets_is_a_usage_error(tmp_path: Path) -> None:
    """A unix socket's path has 107 bytes; that is said before anything is made."""
    with pytest.raises(UsageError, match="too long"):
        RunDir(tmp_path / ("x" * 100)).prepare()
    assert list(tmp_path.iterdir()) == []


def test_empty_namespaces_come_and_go() -> None:
    """`Netns.empty` makes one that nobody is in, and leaves the thread where it was."""
    with Netns.own() as own, Netns.empty() as empty, Netns.own() as still:
        assert own.key == still.key != empty.key
