"""The current mesh: enrolments come and go, the file is loaded again, and the log says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from pyambient.mesh.localfile import MeshFileError, follow, refresh
from pyambient.mesh.view import MeshView
from pyambient.observe import logs
from tests.mesh.build import workload

POD = workload("pod", "10.0.0.2", uid="u1")
SERVER = """
workloads:
- {name: server, namespace: default, serviceAccount: pod, protocol: HBONE,
   workloadIps: [10.0.0.2], services: {}}
"""
ENTRY = "Kubernetes//Pod/default/server"


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """The log, a line each, without its time."""
    written: list[str] = []
    logs.configure("plain", "info", lambda line: written.append(line.partition("\t")[2]))
    yield written
    logs.configure("plain")


@pytest.fixture
def mesh_file(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(SERVER)
    return path


def test_publish_and_withdraw():
    """An enrolled pod is in the mesh until it is withdrawn; a snapshot in use does not change."""
    view = MeshView()
    before = view.snapshot
    view.publish(POD)
    during = view.snapshot
    view.withdraw("u1")
    assert before.workload_by_uid("u1") is None
    assert during.workload_by_address("", "10.0.0.2") is POD
    assert view.snapshot.workload_by_uid("u1") is None
    assert view.snapshot.workload_by_address("", "10.0.0.2") is None


def test_publish_again():
    """A pod whose addresses changed is published again."""
    view = MeshView()
    view.publish(POD)
    view.publish(workload("pod", "10.0.0.3", uid="u1"))
    assert view.snapshot.workload_by_address("", "10.0.0.2") is None
    assert view.snapshot.workload_by_address("", "10.0.0.3").uid == "u1"


def test_withdraw_of_a_stranger():
    """Withdrawing what was never published changes nothing."""
    view = MeshView()
    view.publish(POD)
    before = view.snapshot
    view.withdraw("u2")
    assert view.snapshot is before


def test_on_change(mesh_file):
    """Whoever wants to know of a change finds the next mesh in place when told."""
    view = MeshView()
    seen = []
    view.on_change = lambda: seen.append(len(view.snapshot.workloads))
    view.publish(POD)
    view.publish(workload("apart", "10.0.0.9", uid="u2"))
    view.withdraw("u2")
    view.load(mesh_file)
    view.withdraw("nobody")
    assert seen == [1, 2, 1, 1]


def test_file_wins(mesh_file):
    """The file's workload stands for the pod, whichever came first."""
    early, late = MeshView(), MeshView()
    early.publish(POD)
    early.load(mesh_file)
    late.load(mesh_file)
    late.publish(POD)
    for view in (early, late):
        assert view.snapshot.own_workload(POD).uid == ENTRY
        assert view.snapshot.workload_by_address("", "10.0.0.2").uid == ENTRY


def test_withdraw_under_the_file(mesh_file):
    """When the pod goes, the file's workload stays as the file has it."""
    view = MeshView()
    view.load(mesh_file)
    view.publish(workload("pod", "10.0.0.2", "fd00::2", uid="u1"))
    assert view.snapshot.workload_by_address("", "fd00::2").uid == ENTRY
    view.withdraw("u1")
    assert view.snapshot.workload_by_address("", "fd00::2") is None
    assert view.snapshot.workload_by_address("", "10.0.0.2").uid == ENTRY
    assert view.snapshot.workload_by_uid("u1") is None


def test_load_replaces(mesh_file):
    """What was in the file before and is not now is gone; enrolled pods stay."""
    view = MeshView()
    view.publish(POD)
    view.load(mesh_file)
    mesh_file.write_text("{}")
    view.load(mesh_file)
    assert view.snapshot.workload_by_uid(ENTRY) is None
    assert view.snapshot.own_workload(POD) is POD


def test_bad_file_changes_nothing(mesh_file):
    """A file that cannot be used leaves the mesh as it was."""
    view = MeshView()
    view.load(mesh_file)
    before = view.snapshot
    mesh_file.write_text("workloads: {}")
    with pytest.raises(MeshFileError, match="key 'workloads': is a mapping"):
        view.load(mesh_file)
    assert view.snapshot is before


def test_trust_domain(mesh_file):
    """The view's trust domain is that of workloads that name none."""
    view = MeshView("example.org")
    view.load(mesh_file)
    assert view.snapshot.workload_by_uid(ENTRY).trust_domain == "example.org"


def test_two_pods_of_one_address(lines):
    """Two pods with one address are each found by uid; look-ups by address are said to pick."""
    view = MeshView()
    twin = workload("twin", "10.0.0.2", uid="u0")
    view.publish(POD)
    assert lines == []
    view.publish(twin)
    assert view.snapshot.workload_by_uid("u1") is POD
    assert view.snapshot.workload_by_uid("u0") is twin
    assert view.snapshot.workload_by_address("", "10.0.0.2") is twin
    assert len(lines) == 1
    assert lines[0].startswith("warn\tmesh\taddress 10.0.0.2 belongs to default/twin (u0)")
    view.withdraw("u0")
    assert view.snapshot.workload_by_address("", "10.0.0.2") is POD


def test_warnings_once_per_change(lines, mesh_file):
    """A conflict is said when it appears, not at every change after, and again when it is back."""
    view = MeshView()
    view.load(mesh_file)
    other = workload("other", "10.0.0.2", uid="u1")
    view.publish(other)
    view.publish(workload("apart", "10.0.0.7", uid="u2"))
    view.load(mesh_file)
    assert [line.split("\t")[0] for line in lines] == ["warn"]
    assert "and wins: identity" in lines[0]
    view.withdraw("u1")
    view.publish(other)
    assert len(lines) == 2


def test_match_is_no_warning(lines, mesh_file):
    """A file that agrees with the enrolment is told as information."""
    view = MeshView()
    view.load(mesh_file)
    view.publish(POD)
    expected = f"workload default/server of {mesh_file} stands for enrolled pod default/pod"
    assert [line.rstrip() for line in lines] == [f"info\tmesh\t{expected}"]


@pytest.mark.parametrize(("wrong", "written"), [(20, 20), (100, 21)])
def test_many_warnings(lines, tmp_path, wrong, written):
    """A file that is wrong a hundred times in one way does not fill the log."""
    path = tmp_path / "mesh.yaml"
    rows = [
        f"- {{name: w{i}, namespace: n, workloadIps: [], services: {{}}, "
        "authorizationPolicies: [n/gone]}"
        for i in range(wrong)
    ]
    path.write_text("\n".join(["workloads:", *rows]))
    MeshView().load(path)
    assert len(lines) == written
    assert "'n/gone', which is not defined" in lines[0]
    assert ("80 more of the like are not shown" in lines[-1]) is (wrong == 100)


def test_repr(mesh_file):
    """A view says what is in it and where that came from."""
    view = MeshView()
    assert repr(view).startswith("<MeshView without a file, 0 enrolled pods, <Snapshot 0")
    view.load(mesh_file)
    assert repr(view).startswith(f"<MeshView {mesh_file}, 0 enrolled pods, <Snapshot 1 workloads")


def replace(path: Path, content: str) -> None:
    """As an editor or a ConfigMap does: write beside and rename."""
    beside = path.with_suffix(".tmp")
    beside.write_text(content)
    beside.rename(path)


class Watch:
    """A view of a file, and what is seen of the file whenever one looks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.view = MeshView()
        self.view.load(path)
        self.seen = self.view.stamp

    def look(self) -> bool:
        """Look once; whether the mesh is another one now."""
        before = self.view.snapshot
        self.seen = trio.run(refresh, self.path, self.view, self.seen)
        return self.view.snapshot is not before


def test_unchanged_file(lines, mesh_file):
    """A file that does not change is not loaded again."""
    watch = Watch(mesh_file)
    assert not watch.look()
    assert lines == []


def test_written_file(lines, mesh_file):
    """A file that is written in place is loaded again, once."""
    watch = Watch(mesh_file)
    mesh_file.write_text(SERVER.replace("server", "other"))
    assert watch.look()
    assert watch.view.snapshot.workload_by_uid("Kubernetes//Pod/default/other")
    assert not watch.look()
    assert len(lines) == 1
    assert "1 workloads, 0 services, 0 policies" in lines[0]


def test_renamed_file(mesh_file):
    """A file put in place by a rename is loaded, even one of the same size and time."""
    watch = Watch(mesh_file)
    status = mesh_file.stat()
    replace(mesh_file, SERVER.replace("server", "sERVER"))
    os.utime(mesh_file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert watch.look()
    assert watch.view.snapshot.workload_by_uid("Kubernetes//Pod/default/sERVER")


def test_bad_file(lines, mesh_file):
    """A bad file is one line, once; what was loaded stays, and the next good file is loaded."""
    watch = Watch(mesh_file)
    replace(mesh_file, "workloads: 5\n")
    assert not watch.look()
    assert not watch.look()
    assert len(lines) == 1
    assert lines[0].startswith("error\tmesh\tthe mesh file is not usable, what was loaded stays")
    assert f"{mesh_file}:1: key 'workloads': is a number, not a list" in lines[0]
    replace(mesh_file, "{}")
    assert watch.look()
    assert watch.view.snapshot.workloads == ()


def test_vanished_file(lines, mesh_file):
    """A file that is gone changes nothing and is said once; when it is back it is loaded."""
    watch = Watch(mesh_file)
    hidden = mesh_file.rename(mesh_file.with_suffix(".away"))
    assert not watch.look()
    assert not watch.look()
    assert len(lines) == 1
    assert "the mesh file is gone, what it said stays in force" in lines[0]
    hidden.rename(mesh_file)
    assert watch.look()


class Signalling(MeshView):
    """A view that tells when something is loaded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.used = trio.Event()

    def use(self, config, source, stamp=None) -> None:
        super().use(config, source, stamp)
        self.used.set()


def test_follow(mesh_file):
    """Following loads what is there, and then every change."""
    view = Signalling()

    async def main() -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(follow, mesh_file, view, 0.01)
                await view.used.wait()
                assert view.snapshot.workload_by_uid(ENTRY)
                view.used = trio.Event()
                replace(mesh_file, "{}")
                await view.used.wait()
                assert view.snapshot.workloads == ()
                nursery.cancel_scope.cancel()

    trio.run(main)
