"""`pyambient verify`: proof that a pod is captured, from inside it."""

from __future__ import annotations

import click

from pyambient.agent.client import ask
from pyambient.agent.config import RunDir
from pyambient.agent.locate import path_of

from .options import Invocation, common_options, examples, require_root


@click.command(
    "verify", epilog=examples("pyambient verify shop", "pyambient verify pid:4711 && echo captured")
)
@click.argument("netns")
@common_options
@click.pass_context
def command(ctx: click.Context, /, *, netns: str) -> None:
    """Prove that the network namespace NETNS is captured.

    Compares what is installed with what was. Connects from inside as an unprivileged process to an
    address that nobody has, and asks it for a name: only the proxy can answer. Finds out who gets
    what comes from outside. Exits with 1 if a check fails.
    """
    require_root("verify")
    run_dir = RunDir(ctx.ensure_object(Invocation).run_dir)
    checks = ask(run_dir, "verify", netns=path_of(netns))
    for check in checks:
        click.echo(_line(check))
    if any(check["problem"] for check in checks):
        ctx.exit(1)


def _line(check: dict[str, str]) -> str:
    if not check["problem"]:
        return f"✔ {check['what']}"
    return f"✘ {check['what']}: {check['problem']}; {check['then']}"
