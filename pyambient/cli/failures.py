"""What a failure looks like: one line on standard error, and an exit code."""

from __future__ import annotations

import os
import sys

import click

from pyambient.errors import root_cause, told


def report(error: BaseException) -> int:
    """Print the one line; the exit code."""
    error = root_cause(error)
    match error:
        case click.exceptions.NoArgsIsHelpError():
            error.show()
            return error.exit_code
        case click.ClickException():
            return _fail(_usage_line(error), error.exit_code)
        case click.Abort():
            return _fail("interrupted", 130)
        case BrokenPipeError():
            # Whoever read our output has seen enough; nothing can be flushed to it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        case _:
            return _fail(*told(error))


def _usage_line(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")
    text = message[:1].lower() + message[1:]
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{text}; see '{error.ctx.command_path} --help'"
    return text


def _fail(line: str, code: int) -> int:
    click.echo(f"error: {line}", err=True)
    return code
