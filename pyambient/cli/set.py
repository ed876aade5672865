"""`pyambient set`: another choice for a pod that is enrolled."""

from __future__ import annotations

from typing import Any

import click

from pyambient.agent.client import ask
from pyambient.agent.config import RunDir
from pyambient.agent.locate import path_of
from pyambient.errors import UsageError

from .capture import capture_options
from .options import Invocation, common_options, examples, require_root


@click.command(
    "set",
    epilog=examples(
        "pyambient set shop --exclude-outbound-ports 22,8000-8100",
        "pyambient set shop --exclude-outbound-cidrs @cidrs.txt",
        "pyambient set shop --exclude-outbound-ports ''",
    ),
)
@click.argument("netns")
@capture_options
@common_options
@click.pass_context
def command(ctx: click.Context, /, *, netns: str, options: dict[str, Any]) -> None:
    """Change what of the enrolled network namespace NETNS is captured.

    What is not named stays as it is; a list that is named replaces the one before. Connections
    that live go on as they began.
    """
    require_root("set")
    if not options:
        raise UsageError("nothing to set", "see 'pyambient set --help'")
    pod = ask(
        RunDir(ctx.ensure_object(Invocation).run_dir), "set", netns=path_of(netns), options=options
    )
    click.echo(f"set {pod['netns']} ({', '.join(options)})")
