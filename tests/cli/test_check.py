"""`pyambient check`: a line per feature, and a backend or exit code 3."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from pyambient.cli import check
from pyambient.cli.main import cli
from pyambient.errors import PyambientError
from tests.bed import CgroupTree
from tests.bed.bpf import pins
from tests.bed.seccomp import noattach, nobpf

_BACKENDS = ("bpf", "tc", "nftables", "iptables")


@pytest.fixture
def words(cgroup_tree: CgroupTree) -> list[str]:
    return ["check", f"--cgroup={cgroup_tree.path}"]


def test_here_every_backend_works(words: list[str], cgroup_tree: CgroupTree) -> None:
    """A tick per check under its backend, the choice of `auto` last, and no trace left."""
    before = cgroup_tree.directories()
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1] == "--backend auto takes bpf"
    headers = [line for line in lines[:-1] if not line.startswith("  ")]
    assert headers == ["machine", *(f"backend {name}" for name in _BACKENDS)]
    assert all(line.startswith("  ✔ ") for line in lines[:-1] if line not in headers)
    assert "  ✔ sk_lookup (Linux 5.9)" in lines
    assert cgroup_tree.directories() == before


def test_it_leaves_no_directory_on_bpffs(words: list[str]) -> None:
    """What an agent would pin there is tried beside its directory, which was left empty."""
    before = pins()
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert pins() == before


def test_the_json_twin(words: list[str]) -> None:
    """The same, with every field, for programs."""
    told = json.loads(CliRunner().invoke(cli, [*words, "-o", "json"]).stdout)
    assert told["backends"] == dict.fromkeys(_BACKENDS, True)
    groups = {finding["group"] for finding in told["checks"]}
    assert groups == {"machine", *_BACKENDS}
    assert all(finding["present"] for finding in told["checks"])


def test_without_bpf_another_backend_is_named(words: list[str]) -> None:
    """bpf(2) missing: a cross with the reason and what is used instead, and still exit code 0."""
    line = nobpf(sys.executable, "-m", "pyambient", *words)
    done = subprocess.run(line, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "--backend auto takes nftables"
    instead = "instead: --backend nftables or iptables"
    assert f"  ✘ bpf(2) (Linux 4.4): Function not implemented; {instead}" in lines


def test_where_nothing_can_be_attached_another_backend_is_named(words: list[str]) -> None:
    """Programs load, but no link is made: neither `bpf` nor `tc`, and still exit code 0."""
    line = noattach(sys.executable, "-m", "pyambient", *words)
    done = subprocess.run(line, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "--backend auto takes nftables"
    refused = "Operation not permitted; instead: --backend nftables or iptables"
    assert lines.count(f"  ✘ sk_lookup (Linux 5.9): {refused}") == 2
    assert "  ✔ bpf(2) (Linux 4.4)" in lines


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let one of the attempts fail."""

    def fail(*_: Any, **__: Any) -> None:
        raise PyambientError("there is no iptables-restore", "install it: apt install iptables")

    monkeypatch.setattr(check, name, fail)


def test_one_backend_is_enough(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Without nft and iptables there is a hint what to install, and `bpf` is taken."""
    without(monkeypatch, "_try_rules")
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0
    assert "✘ rules of iptables: there is no iptables-restore; install it" in result.stdout


def test_none_is_unsupported(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Exit code 3, and the last line says so."""
    without(monkeypatch, "_try_rules")
    monkeypatch.setattr(check, "_missing_capabilities", lambda: ["BPF"])
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 3
    assert result.stdout.splitlines()[-1] == "no backend works here"
    assert "  ✘ capabilities" in result.stdout
