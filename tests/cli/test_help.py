"""Help: examples for every command, and nothing loaded that it does not need."""

from __future__ import annotations

import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from pyambient import __version__
from pyambient.cli.main import cli

COMMANDS = [
    "up",
    "enroll",
    "set",
    "unenroll",
    "status",
    "verify",
    "explain",
    "trace",
    "check",
    "bench",
    "agent",
    "proxy",
]
HEAVY = ["trio", "pyroute2", "structlog", "OpenSSL", "cryptography", "google.protobuf", "rich"]


def test_the_commands_are_these() -> None:
    """In the order in which somebody needs them."""
    assert cli.list_commands(click.Context(cli)) == COMMANDS


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)])
def test_help_ends_with_examples(words: list[str]) -> None:
    """Every example starts with the program's name and, for a command, with that command."""
    result = CliRunner().invoke(cli, [*words, "--help"])
    assert result.exit_code == 0
    _, examples = result.output.split("Examples:\n")
    lines = [line.strip() for line in examples.strip().splitlines()]
    assert lines
    assert all("pyambient" in line for line in lines)
    assert all(word in line for line in lines for word in words)


def test_the_overview_names_every_command() -> None:
    """With a summary each, which is not loaded from the command."""
    overview = CliRunner().invoke(cli, ["--help"]).output
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z]\w+ ", overview, re.MULTILINE)


def test_the_overview_loads_nothing_heavy() -> None:
    """`pyambient --help` answers before a user notices: it imports click and little else."""
    program = (
        "import sys\n"
        "from pyambient.cli.main import cli\n"
        "try: cli.main(['--help'], prog_name='pyambient')\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], text=True, capture_output=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_version() -> None:
    """`--version` names the program and its version."""
    result = CliRunner().invoke(cli, ["--version"], prog_name="pyambient")
    assert result.output == f"pyambient {__version__}\n"


def test_nothing_to_do_shows_the_help() -> None:
    """Without a command it is a usage error that helps."""
    result = CliRunner().invoke(cli, [])
    assert result.exit_code == 2
    assert "Examples:" in result.output
