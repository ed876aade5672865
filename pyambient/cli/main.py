"""`pyambient`: the command line's root, and what every failure of it looks like.

A failure is one line on standard error, `error: what happened; what to do next`, and an exit code:
1 failed, 2 usage, 3 unsupported by this kernel, 4 needs root. The traceback is for `--debug`.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, NoReturn

import click

from pyambient import __version__

from .failures import report
from .options import Invocation, common_options, examples


class _Entry(NamedTuple):
    """A command, told of without importing it."""

    module: str
    summary: str


_COMMANDS: Final = {
    "up": _Entry("up", "Run agent and proxy together, in the foreground"),
    "enroll": _Entry("enroll", "Put a network namespace into the mesh"),
    "set": _Entry("set", "Change what of an enrolled namespace is captured"),
    "unenroll": _Entry("unenroll", "Take a network namespace out of the mesh"),
    "status": _Entry("status", "Show what is enrolled"),
    "verify": _Entry("verify", "Prove that a network namespace is captured"),
    "explain": _Entry("explain", "Say what would happen to a connection, rule by rule"),
    "trace": _Entry("trace", "Show what the interception decides, as it happens"),
    "check": _Entry("check", "Show what this machine can do"),
    "bench": _Entry("bench", "Measure what an interception costs"),
    "agent": _Entry("agent", "Run the agent alone"),
    "proxy": _Entry("proxy", "Run the proxy alone"),
}


class RootGroup(click.Group):
    """Loads a command when it is named, and turns what commands raise into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"pyambient.cli.{_COMMANDS[cmd_name].module}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in _COMMANDS.items()])

    def main(self, args: Sequence[str] | None = None, *rest: Any, **more: Any) -> NoReturn:
        """Run the command line and exit."""
        invocation = Invocation()
        more = {**more, "standalone_mode": False, "obj": invocation}
        try:
            code = super().main(args, *rest, **more)
        except Exception as error:  # noqa: BLE001 - every failure ends as one line
            if invocation.debug:
                traceback.print_exc()
            code = report(error)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(
    cls=RootGroup,
    context_settings={"auto_envvar_prefix": "PYAMBIENT", "help_option_names": ["-h", "--help"]},
    epilog=examples(
        "sudo pyambient up",
        "sudo pyambient enroll shop --namespace default --service-account shop",
        "sudo pyambient status",
    ),
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@common_options
def cli() -> None:
    """Put any Linux network namespace into an Istio-ambient mesh."""


def main() -> NoReturn:
    """The console script."""
    cli.main(prog_name="pyambient")
