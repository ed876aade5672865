"""Enrolling by the command line: what works, and every bad input with its one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyambient.cli.main import cli
from pyambient.model.backends import BACKENDS
from tests.bed import Bed, BedPod, Mesh, apps, changes, kernel_state

IDENTITY = ["--namespace=default", "--service-account=shop"]


@pytest.fixture(scope="module")
def running(cgroup_tree, tmp_path_factory) -> Iterator[Mesh]:
    """A `pyambient up` for the tests that only fail."""
    with Bed(cgroup_tree) as bed, Mesh(bed, tmp_path_factory.mktemp("mesh")) as mesh:
        yield mesh


@pytest.fixture
def pod(running: Mesh) -> Iterator[BedPod]:
    """A pod that nothing was done to, and to which nothing may be done."""
    made = running.bed.pod("shop")
    before = kernel_state(made)
    yield made
    assert running.status()["pods"] == []
    assert changes(before, kernel_state(made)) == []
    running.bed.remove_pod(made)


def refused(mesh: Mesh, *words: str, code: int) -> str:
    """What `pyambient enroll` says when it refuses: one line, and nothing on stdout."""
    done = mesh.cli("enroll", *words, *IDENTITY, code=code)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_says_what_it_enrolled(bed: Bed, tmp_path: Path, backend: str) -> None:
    """Names, backend and addresses; by name, path or pid; named after the namespace or not."""
    with Mesh(bed, tmp_path) as mesh:
        one, two = bed.pod("one"), bed.pod("two")
        done = mesh.cli("enroll", "one", *IDENTITY, f"--backend={backend}")
        assert done.stdout == f"enrolled one as default/one ({backend}, {one.ipv4} {one.ipv6})\n"
        done = mesh.cli("enroll", two.path, *IDENTITY, "--name=shop-2", f"--backend={backend}")
        assert done.stdout == f"enrolled two as default/shop-2 ({backend}, {two.ipv4} {two.ipv6})\n"
        for pod in (one, two):
            lines = mesh.cli("verify", pod.name).stdout.splitlines()
            assert all(line.startswith("✔ ") for line in lines)
            assert len(lines) == 13
        at_once = "--drain-timeout=0"
        assert mesh.cli("unenroll", "one", at_once).stdout.startswith("unenrolled one")
        assert mesh.cli("unenroll", "--all", at_once).stdout.startswith("unenrolled two")
        assert mesh.cli("unenroll", "--all").stdout == ""


def test_a_process_can_name_the_namespace(running: Mesh) -> None:
    """`pid:N` is the namespace of a process; it needs a name of its own."""
    pod = running.bed.pod("anonymous")
    sleeper = pod.spawn(lambda channel: channel.send("here") or channel.receive())
    assert sleeper.receive() == "here"
    assert "--name" in refused(running, f"pid:{sleeper.pid}", code=2)
    running.cli("enroll", f"pid:{sleeper.pid}", "--name=shop", *IDENTITY)
    assert [p["netns"] for p in running.status()["pods"]] == [f"pid:{sleeper.pid}"]
    running.cli("unenroll", "anonymous")
    assert running.status()["pods"] == []
    running.bed.remove_pod(pod)


def test_a_dry_run_prints_and_does_nothing(running: Mesh, pod: BedPod) -> None:
    """The plan of each backend, in stages, with the pod's own addresses; no agent is asked."""
    words = ["enroll", pod.path, *IDENTITY, "--dry-run", "--run-dir=/nonexistent/run"]
    for backend in BACKENDS:
        cgroup = f"--cgroup={running.bed.cgroup.path}"
        result = CliRunner().invoke(cli, [*words, f"--backend={backend}", cgroup])
        assert result.exit_code == 0, result.stderr
        stages = [line for line in result.stdout.splitlines() if line.startswith("# ")]
        assert [s for s in ("# prepare", "# apply", "# steer", "# gate") if s in stages] == [
            "# prepare",
            "# apply",
            "# steer",
            "# gate",
        ]
        assert f"src {pod.ipv4}" in result.stdout or backend != "bpf"
        assert "15001" in result.stdout


def test_a_namespace_that_does_not_exist(running: Mesh) -> None:
    """Usage, with where names come from."""
    assert "'ip netns'" in refused(running, "nowhere", code=2)
    assert "'ip netns'" in refused(running, "/proc/self/status", code=2)
    assert "'ip netns'" in refused(running, "pid:999999999", "--name=x", code=2)


def test_the_hosts_own_namespace(running: Mesh) -> None:
    """Enrolling the node would cut the mesh itself off."""
    line = refused(running, f"/proc/{os.getpid()}/ns/net", "--name=host", code=2)
    assert "host's own network namespace" in line


def test_a_namespace_twice(running: Mesh) -> None:
    """The second time names the pod it is, and how to free it; a dry run does, too."""
    pod = running.bed.pod("twice")
    running.enroll(pod)
    for more in ([], ["--dry-run"]):
        line = refused(running, "twice", *more, code=2)
        assert "twice is enrolled already, as default/twice" in line
        assert "pyambient unenroll twice" in line
    running.unenroll(pod)


def test_processes_outside_the_cgroup(running: Mesh, pod: BedPod) -> None:
    """Their connects would not be hooked, so they are named; the other backend takes them."""
    outside = running.bed.cgroup.path.parent
    stray = pod.spawn(
        lambda channel: channel.send("here") or channel.receive(), uid=0, gid=0, cgroup=outside
    )
    assert stray.receive() == "here"
    line = refused(running, "shop", "--backend=bpf", code=1)
    assert f"outside --cgroup {running.bed.cgroup.path}: {stray.pid} (" in line
    stray.kill()


@pytest.mark.parametrize("backend", ["bpf", "iptables"])
@pytest.mark.parametrize("port", [15001, 15006, 15008, 15053])
def test_a_port_that_is_taken(running: Mesh, pod: BedPod, backend: str, port: int) -> None:
    """The proxy takes another one; a dry run says who has it, and the enrolment that it was."""
    words = ["shop", "--namespace=default", "--service-account=shop", f"--backend={backend}"]
    with pod.spawn(apps.echo_server, port) as server:
        assert server.receive() == "listening"
        dry = running.cli("enroll", *words, "--dry-run", f"--cgroup={running.bed.cgroup.path}")
        assert dry.stdout.startswith(f"# port {port} is taken by {server.pid} (")
        assert f"the proxy takes {port + 100}\n" in dry.stdout
        enrolled = running.cli("enroll", *words)
        said = f"shop: the proxy listens on {port + 100}, as {port} was taken"
        assert said in enrolled.stdout.splitlines()
        assert said in running.cli("status").stdout.splitlines()
        running.unenroll(pod)


@pytest.mark.parametrize(
    ("words", "undo", "text"),
    [
        ("iptables -t nat -N ISTIO_OUTPUT", "nft delete table ip nat", "ISTIO_OUTPUT"),
        ("ip6tables -t mangle -N ISTIO_X", "nft delete table ip6 mangle", "ISTIO_X"),
        ("ip route add 10.9.0.0/16 dev eth0 table 100", "ip route flush table 100", "table 100"),
        ("ip -6 rule add pref 32764 lookup main", "ip -6 rule del pref 32764", "pref 32764"),
    ],
)
def test_what_another_tool_has_put_there(
    running: Mesh, pod: BedPod, words: str, undo: str, text: str
) -> None:
    """Chains, routes and rules of others are never touched and never built upon."""
    pod.command(*words.split())
    for backend in ("bpf", "iptables"):
        assert text in refused(running, "shop", f"--backend={backend}", code=1)
    pod.command(*undo.split())


def test_without_cgroup2(monkeypatch: pytest.MonkeyPatch, pod: BedPod) -> None:
    """`bpf` says how to get it; `auto` does without."""
    monkeypatch.setattr("pyambient.intercept.mounts.find_cgroup2_root", lambda: None)
    words = ["enroll", pod.path, *IDENTITY, "--dry-run"]
    result = CliRunner().invoke(cli, [*words, "--backend=bpf"])
    assert "mount -t cgroup2" in result.stderr
    assert result.exit_code == 1
    assert CliRunner().invoke(cli, words).exit_code == 0


def test_names_that_cannot_be(running: Mesh, pod: BedPod) -> None:
    """A name must fit a SPIFFE id."""
    assert "cannot be a name" in refused(running, "shop", "--name=a b", code=2)
