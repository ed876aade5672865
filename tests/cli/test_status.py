"""The table of `pyambient status`, and its JSON twin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyambient.agent.config import RunDir
from pyambient.agent.records import NetnsRef, Record, RecordStore, State
from pyambient.cli.main import cli
from pyambient.cli.status import table
from pyambient.intercept.options import CaptureOptions
from pyambient.model.workload import PodRef

TABLE = """\
NETNS   NAME     NAMESPACE  SERVICE-ACCOUNT  BACKEND   STATE     ADDRESSES
pid:42  a        default    client           iptables  draining  -
shop    shop-1   default    shop             bpf       enrolled  10.0.0.2 fd00::2
/srv/x  another  zone       shop             bpf       enrolled  10.0.0.2
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with three records, written in no order, and no agent."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.prepare()
    store = RecordStore(run_dir.pods)
    for path, pod, backend, state, addresses in (
        ("/srv/x", PodRef("u3", "another", "zone", "shop"), "bpf", State.ENROLLED, ("10.0.0.2",)),
        (
            "/run/netns/shop",
            PodRef("u1", "shop-1", "default", "shop"),
            "bpf",
            State.ENROLLED,
            ("10.0.0.2", "fd00::2"),
        ),
        ("/proc/42/ns/net", PodRef("u2", "a", "default", "client"), "iptables", State.DRAINING, ()),
    ):
        store.write(Record(pod, NetnsRef(path, 4, 1, None), backend, state, (), addresses))
    return run_dir.path


def test_the_table(run_dir: Path) -> None:
    """Aligned, sorted by namespace and name, "-" for nothing; what is no data is on stderr."""
    result = CliRunner().invoke(cli, ["status", f"--run-dir={run_dir}"])
    assert result.stdout == TABLE
    assert result.stderr.startswith("note: the agent is not running")
    assert result.exit_code == 0


def test_the_json_twin(run_dir: Path) -> None:
    """The same pods with more fields, and nothing else on stdout."""
    result = CliRunner().invoke(cli, ["--run-dir", str(run_dir), "status", "-o", "json"])
    status = json.loads(result.stdout)
    assert status["agent"] is None
    assert status["proxies"] == []
    assert [pod["uid"] for pod in status["pods"]] == ["u2", "u1", "u3"]
    assert status["pods"][1] == {
        "netns": "shop",
        "path": "/run/netns/shop",
        "uid": "u1",
        "name": "shop-1",
        "namespace": "default",
        "service_account": "shop",
        "backend": "bpf",
        "state": "enrolled",
        "addresses": ["10.0.0.2", "fd00::2"],
        "options": CaptureOptions().to_json(),
        "ports": {"outbound": 15001, "inbound": 15006, "hbone": 15008, "dns": 15053},
        "guard": None,
    }


def test_an_unreadable_record_spares_the_others(run_dir: Path) -> None:
    """It is named on stderr."""
    run_dir.joinpath("pods/u0.json").write_text("{")
    result = CliRunner().invoke(cli, ["status", f"--run-dir={run_dir}"])
    assert result.stdout == TABLE
    assert "u0.json is not a record" in result.stderr


def test_nothing_enrolled_is_just_the_header() -> None:
    """Also where there is no run directory at all."""
    result = CliRunner().invoke(cli, ["status", "--run-dir=/nonexistent/run"])
    header = "NETNS  NAME  NAMESPACE  SERVICE-ACCOUNT  BACKEND  STATE  ADDRESSES\n"
    assert result.stdout == header


def test_the_run_directory_from_the_environment(run_dir: Path) -> None:
    """PYAMBIENT_RUN_DIR is --run-dir; the option wins."""
    environment = {"PYAMBIENT_RUN_DIR": str(run_dir)}
    assert CliRunner().invoke(cli, ["status"], env=environment).stdout == TABLE
    other = CliRunner().invoke(cli, ["status", "--run-dir=/nonexistent"], env=environment)
    assert "shop" not in other.stdout


def test_a_table_of_nothing_has_its_header() -> None:
    """Columns are as wide as their widest cell."""
    assert table([], ["A", "BB"]) == ["A  BB"]
    assert table([["longer", ""], ["x", "y"]], ["A", "BB"]) == [
        "A       BB",
        "longer  -",
        "x       y",
    ]
