"""Every failure is one line on standard error and an exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from pyambient.cli import status
from pyambient.cli.main import cli
from pyambient.errors import (
    NeedsRoot,
    PyambientError,
    UnsupportedFeature,
    UsageError,
)

NOWHERE = ["--run-dir", "/nonexistent/run"]


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, words, prog_name="pyambient")


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Result:
    """What `pyambient status` does when it fails like that."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(status, "ask", fail)
    return run("status")


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (PyambientError("it broke", "mend it"), "error: it broke; mend it\n", 1),
        (UsageError("no such thing"), "error: no such thing\n", 2),
        (
            UnsupportedFeature("wings", "9.9", "walk"),
            "error: this kernel has no wings (Linux 9.9 and later do); walk\n",
            3,
        ),
        (NeedsRoot("flying"), "error: flying needs root; run it with sudo\n", 4),
        (
            ExceptionGroup("nursery", [ExceptionGroup("inner", [PyambientError("deep down")])]),
            "error: deep down\n",
            1,
        ),
        (click.Abort(), "error: interrupted\n", 130),
    ],
)
def test_known_failures(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, line: str, code: int
) -> None:
    """What happened, what to do next, and the exit code of its kind."""
    result = failing(monkeypatch, error)
    assert (result.stderr, result.stdout, result.exit_code) == (line, "", code)


def test_unknown_failures_are_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug shows its kind and text, not its traceback, unless asked for."""
    result = failing(monkeypatch, KeyError("a\nb"))
    assert result.stderr.startswith("error: KeyError: ")
    assert result.stderr.count("\n") == 1
    assert "--debug" in result.stderr
    assert result.exit_code == 1


@pytest.mark.parametrize("words", [["--debug", "status"], ["status", "--debug"]])
def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Before or after the command's name."""
    monkeypatch.setattr(status, "ask", lambda *_: 1 / 0)
    result = run(*words)
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["fly"], "no such command 'fly'; see 'pyambient --help'"),
        (["enroll"], "missing argument 'NETNS'; see 'pyambient enroll --help'"),
        (["set"], "missing argument 'NETNS'; see 'pyambient set --help'"),
        (["unenroll"], "give either NETNS or --all; see 'pyambient unenroll --help'"),
        (["unenroll", "x", "--all"], "give either NETNS or --all; see 'pyambient unenroll --help'"),
        (["status", "-o", "xml"], "'xml' is not one of 'text', 'json'"),
        (["unenroll", "x", "--drain-timeout", "-1"], "-1.0 is not in the range"),
        (
            ["enroll", "x", "--namespace=a", "--service-account=b", "--backend=magic"],
            "'magic' is not one of 'auto', 'bpf', 'tc', 'nftables', 'iptables'",
        ),
    ],
)
def test_usage_errors(words: list[str], line: str) -> None:
    """One line, which names the help to read, and exit code 2."""
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert line in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["up"],
        ["agent"],
        ["proxy"],
        ["enroll", "x", "--namespace=a", "--service-account=b"],
        ["unenroll", "x"],
        ["status"],
        ["verify", "x"],
        ["check"],
    ],
)
def test_root_is_needed(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Each command says so before it does anything, with exit code 4."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    result = run(*NOWHERE, *words)
    assert result.stderr == f"error: pyambient {words[0]} needs root; run it with sudo\n"
    assert result.exit_code == 4


@pytest.mark.parametrize(
    "words", [["enroll", "x", "--namespace=a", "--service-account=b"], ["verify", "x"]]
)
def test_an_absent_agent_is_named(words: list[str]) -> None:
    """What only an agent can do says how to get one."""
    result = run(*NOWHERE, *words)
    assert "the agent is not running" in result.stderr
    assert "pyambient up" in result.stderr
    assert result.exit_code == 1


def test_a_cgroup_that_is_none_is_a_usage_error(tmp_path: Path) -> None:
    """--cgroup must be a directory of cgroup2."""
    result = run("agent", f"--cgroup={tmp_path}")
    assert f"{tmp_path} is not a directory of cgroup2" in result.stderr
    assert result.exit_code == 2


def test_a_reader_that_leaves_is_no_traceback() -> None:
    """`pyambient ... | head` ends quietly."""
    program = (
        "import sys; from pyambient.cli.main import cli; import pyambient.cli.status as s\n"
        "s.ask = lambda *_: {'agent': None, 'proxies': [], 'pods': [\n"
        " dict(netns='n', name='n', namespace='n', service_account='n', backend='b', state='s',\n"
        "      addresses=[])] * 100000}\n"
        "cli.main(['status'])"
    )
    line = [sys.executable, "-c", program]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
