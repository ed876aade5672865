"""Choosing what is captured by the command line: at enrolment, later, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyambient.cli.main import cli
from pyambient.intercept.options import CaptureOptions
from pyambient.model.address import SocketAddress
from pyambient.model.backends import BACKENDS
from tests.bed import Bed, Mesh, apps, changes, kernel_state

IDENTITY = ["--namespace=default", "--service-account=shop"]
PORT = 8080


@pytest.fixture
def running(bed: Bed, tmp_path: Path) -> Iterator[Mesh]:
    """A `pyambient up`, two pods that can be enrolled, and a server outside of the mesh."""
    for name in ("shop", "other"):
        bed.pod(name)
    assert bed.pod("outside").spawn(apps.echo_server, PORT).receive() == "listening"
    with Mesh(bed, tmp_path) as mesh:
        yield mesh


def _fetch(mesh: Mesh) -> None:
    destination = SocketAddress(mesh.bed.pods["outside"].address("v4"), PORT)
    assert mesh.bed.pods["shop"].run(apps.request, destination, b"hello").data == b"hello"


@pytest.mark.parametrize("backend", BACKENDS)
def test_choices_of_a_live_pod(running: Mesh, backend: str) -> None:
    """Chosen at enrolment, shown by status, replaced list by list, and taken back."""
    pods = [running.bed.pods["shop"], running.bed.pods["other"]]
    before = kernel_state(*pods)
    cidr = running.bed.pods["outside"].address("v4")
    more = [*IDENTITY, f"--backend={backend}"]
    running.cli("enroll", "shop", *more, f"--exclude-outbound-cidrs={cidr}")
    running.cli("enroll", "other", *more)
    assert f"shop: outbound exclude cidrs {cidr}/32" in running.cli("status").stdout.splitlines()

    _fetch(running)
    done = running.cli("set", "shop", "--exclude-outbound-ports=22,8000-8100")
    assert done.stdout == "set shop (outbound)\n"
    shown = {pod["name"]: pod["options"] for pod in running.status()["pods"]}
    assert shown["shop"]["outbound"] == {
        "exclude_cidrs": f"{cidr}/32",
        "exclude_ports": "22,8000-8100",
    }
    assert shown["other"] == CaptureOptions().to_json()

    running.cli("set", "shop", "--exclude-outbound-ports=", "--exclude-outbound-cidrs=")
    assert len(running.cli("status").stdout.splitlines()) == 3
    _fetch(running)
    assert len(running.access_log({"direction": "outbound"})) == 1
    running.cli("unenroll", "--all", "--drain-timeout=0")
    assert changes(before, kernel_state(*pods)) == []


def test_a_list_in_a_file(running: Mesh, tmp_path: Path) -> None:
    """10,000 CIDRs, more than one argument can hold, are chosen and taken back."""
    cidrs = [f"10.{n >> 8}.{n & 255}.0/24" for n in range(10_000)]
    file = tmp_path / "cidrs"
    file.write_text("\n".join(cidrs) + "\n")
    running.cli("enroll", "shop", *IDENTITY)
    running.cli("set", "shop", f"--exclude-outbound-cidrs=@{file}")
    (pod,) = running.status()["pods"]
    assert pod["options"]["outbound"]["exclude_cidrs"].split(",") == cidrs
    assert " and 9992 more" in running.cli("status").stdout
    running.cli("set", "shop", "--exclude-outbound-cidrs=")


def test_a_dry_run_shows_the_choices(running: Mesh) -> None:
    """In the words of each backend."""
    cgroup = f"--cgroup={running.bed.cgroup.path}"
    words = ["enroll", running.bed.pods["shop"].path, *IDENTITY, "--dry-run", cgroup]
    chosen = ["--exclude-outbound-cidrs=10.96.0.0/12", "--include-inbound-ports=80,443"]
    shown = {
        "bpf": "bpf map selections += outbound: exclude cidrs 10.96.0.0/12",
        "nftables": "ip daddr { 10.96.0.0/12 } return",
        "iptables": "-A ISTIO_OUTPUT -d 10.96.0.0/12 -j RETURN",
    }
    for backend, line in shown.items():
        result = CliRunner().invoke(cli, [*words, f"--backend={backend}", *chosen])
        assert line in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nothing to set"),
        (["--exclude-outbound-ports=ssh"], "'ssh' is no port; give numbers and ranges"),
        (["--exclude-inbound-cidrs=10.0.0.1/8"], "write 10.0.0.0/8"),
        (["--include-outbound-cidrs=@/nonexistent"], "cannot read /nonexistent"),
        (["--reroute-virtual-interfaces=lo"], "'lo' is no virtual interface"),
        (["--reroute-virtual-interfaces=tap0"], "use --backend tc, nftables or iptables"),
    ],
)
def test_what_cannot_be_set(running: Mesh, words: list[str], says: str) -> None:
    """One line, and the pod stays as it was."""
    running.cli("enroll", "shop", *IDENTITY, "--backend=bpf")
    before = running.status()["pods"][0]["options"]
    state = kernel_state(running.bed.pods["shop"])
    code = 1 if "use --backend" in says else 2
    done = running.cli("set", "shop", *words, code=code)
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert running.status()["pods"][0]["options"] == before
    assert changes(state, kernel_state(running.bed.pods["shop"])) == []


def test_a_pod_that_is_not_enrolled(running: Mesh) -> None:
    """Usage, as for every command that takes one."""
    done = running.cli("set", "shop", "--exclude-outbound-ports=22", code=2)
    assert "shop is not enrolled" in done.stderr
