"""`pyambient up` as a supervisor: what it says, what it restarts, and how it stops."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from pyambient.agent.config import RunDir
from pyambient.errors import UsageError
from tests.bed import Bed, Mesh, apps, changes, is_gone, kernel_state

READY = "pyambient is ready in {run_dir}: 0 pods enrolled, press Ctrl-C to stop"


def said(mesh: Mesh) -> str:
    return mesh.log.read_text()


def child_pid(mesh: Mesh, name: str) -> int:
    """The agent's or the (only) proxy's pid."""
    status = mesh.status()
    return int(status["agent"]["pid"] if name == "agent" else status["proxies"][0])


def test_it_says_when_it_is_ready(mesh: Mesh) -> None:
    """One line, once both children work together."""
    ready = READY.format(run_dir=mesh.run_dir)
    mesh.wait_until(lambda: ready in said(mesh), "ready line")
    assert said(mesh).count("pyambient is ready") == 1
    assert mesh.status()["proxies"] != []


@pytest.mark.parametrize("name", ["agent", "proxy"])
def test_a_killed_child_is_started_again(mesh: Mesh, backend: str, name: str) -> None:
    """It says so, and pods that were enrolled are captured and served again."""
    one, two = mesh.bed.pod("one"), mesh.bed.pod("two")
    for pod in (one, two):
        mesh.enroll(pod, backend=backend)
    victim = child_pid(mesh, name)
    os.kill(victim, signal.SIGKILL)
    mesh.wait_until(lambda: f"the {name} was ended by SIGKILL; next start" in said(mesh), "notice")
    mesh.wait_until(lambda: _serving(mesh) and child_pid(mesh, name) != victim, "new child")
    for pod in (one, two):
        mesh.cli("verify", pod.name)


def _serving(mesh: Mesh) -> bool:
    """Whether an agent answers and its proxy holds every pod."""
    try:
        status = mesh.status()
    except AssertionError:
        return False
    pods = status["pods"]
    return bool(status["proxies"]) and all(pod["proxy"] for pod in pods)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_pods_enrolled(bed: Bed, tmp_path: Path, number: int) -> None:
    """Both children end, connections are refused, and the way out it names works by itself."""
    pod = bed.pod("one")
    before = kernel_state(pod)
    with Mesh(bed, tmp_path) as mesh:
        mesh.enroll(pod)
        pids = [child_pid(mesh, "agent"), child_pid(mesh, "proxy")]
        assert mesh.process is not None
        mesh.process.send_signal(number)
        assert mesh.stop() == 0
        assert all(is_gone(pid) for pid in pids)
        last = said(mesh).splitlines()[-1]
        assert "pods that stay enrolled: 1" in last
        assert last.endswith(f"pyambient --run-dir {mesh.run_dir} unenroll --all")
        nowhere = apps.SocketAddress("10.77.0.1", 9)
        assert pod.run(apps.request, nowhere).stage == "connect"
        done = mesh.cli("unenroll", "--all")
        assert done.stdout == "unenrolled one (without an agent: nothing was drained)\n"
        assert changes(before, kernel_state(pod)) == []


def test_stopped_with_nothing_enrolled_it_leaves_no_cgroup(bed: Bed, tmp_path: Path) -> None:
    """The proxy's cgroup goes with the proxy, unless pods still depend on it."""
    with Mesh(bed, tmp_path) as mesh:
        assert bed.cgroup.proxy.is_dir()
        assert mesh.stop() == 0
        assert not bed.cgroup.proxy.exists()


def test_killed_it_takes_its_children_along(mesh: Mesh) -> None:
    """Nobody is left to serve or to compete with the next `up`; the pods stay closed."""
    pids = [child_pid(mesh, "agent"), child_pid(mesh, "proxy")]
    assert mesh.process is not None
    mesh.process.kill()
    mesh.process.wait()
    while not all(is_gone(pid) for pid in pids):
        os.sched_yield()
    mesh.start()
    assert mesh.status()["proxies"] != []


@pytest.mark.parametrize("options", [(), ("--workers=2",)])
@pytest.mark.parametrize(
    ("mesh_file", "words"),
    [
        ("workloads: [", r"error: .*mesh\.yaml"),
        ("workload: []", r"error: .*mesh\.yaml.*workload"),
    ],
)
def test_what_cannot_start_is_not_tried_again(
    bed: Bed, tmp_path: Path, mesh_file: str, words: str, options: tuple[str, ...]
) -> None:
    """A malformed mesh file ends `up` with the line of the child that could not use it."""
    mesh = Mesh(bed, tmp_path, options=options)
    mesh.mesh_file.write_text(mesh_file)
    try:
        with pytest.raises(AssertionError, match="up ended early"):
            mesh.start()
        assert mesh.process is not None
        assert mesh.process.returncode == UsageError.exit_code
    finally:
        mesh.kill()
    errors = [line for line in said(mesh).splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert re.match(words, errors[0])
    assert "next start" not in said(mesh)


def test_a_second_up_in_the_same_place_is_refused(mesh: Mesh) -> None:
    """It ends with one line and touches nothing of the first."""
    proxies = mesh.status()["proxies"]
    done = mesh.cli("up", f"--cgroup={mesh.bed.cgroup.path}", code=1)
    assert "another pyambient agent works in" in done.stderr
    assert mesh.status()["proxies"] == proxies


def test_a_failing_run_directory_is_one_line(tmp_path: Path, mesh: Mesh) -> None:
    """Before any child is started."""
    mesh.run_dir, kept = tmp_path / ("x" * 200), mesh.run_dir
    done = mesh.cli("up", code=2)
    mesh.run_dir = kept
    assert done.stderr.startswith("error: --run-dir")
    assert "is too long" in done.stderr


def test_the_farewell_of_an_empty_agent() -> None:
    """Where nothing is enrolled there is nothing to free."""
    assert RunDir(Path("/nonexistent")).farewell("x") == "x has stopped; no pod is enrolled"
