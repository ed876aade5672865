"""`pyambient explain`: what would happen to a connection, rule by rule."""

from __future__ import annotations

import json
from typing import Any

import click

from pyambient.agent.client import AgentAbsent, ask
from pyambient.agent.config import RunDir
from pyambient.agent.locate import path_of
from pyambient.errors import UsageError

from .options import Invocation, common_options, examples, output_option, require_root


@click.command(
    "explain",
    epilog=examples(
        "pyambient explain shop 10.77.0.3:8080",
        "pyambient explain shop [fd77::3]:5432 -o json | jq .outcome",
        "pyambient explain db 10.77.0.3:5432 --inbound 10.77.0.2",
    ),
)
@click.argument("netns")
@click.argument("destination", metavar="DST[:PORT]")
@click.option(
    "--inbound",
    "source",
    default="",
    metavar="FROM",
    help="Explain a connection that comes from the address FROM; DST is the pod's own.",
)
@click.option(
    "--device", default="", metavar="DEVICE", help="Of an app that binds its socket to DEVICE."
)
@output_option
@common_options
@click.pass_context
def command(
    ctx: click.Context, /, *, netns: str, destination: str, source: str, device: str, output: str
) -> None:
    """Say what would happen to a connection of the enrolled network namespace NETNS.

    A line for each rule that is asked, "yes" where it matches, and last what comes of them.
    Nothing is sent. Port 80 is assumed where none is given; without agent or proxy it is said as
    far as it goes without them.
    """
    require_root("explain")
    if source and device:
        raise UsageError("--device is for what goes out", "leave it or --inbound out")
    run_dir = RunDir(ctx.ensure_object(Invocation).run_dir)
    asked = {"netns": path_of(netns), "to": destination, "source": source, "device": device}
    try:
        explained = ask(run_dir, "explain", **asked)
    except AgentAbsent as absent:
        explained = _recorded(run_dir, **asked)
        click.echo(f"note: {absent.what}", err=True)
    if output == "json":
        click.echo(json.dumps(explained, indent=2))
        return
    for number, finding in enumerate(explained["findings"], 1):
        click.echo(_line(number, finding))
    click.echo(f"{explained['outcome']}: {explained['summary']}")


def _line(number: int, finding: dict[str, Any]) -> str:
    matched = "yes" if finding["matched"] else "no"
    return f"{number:2}. {matched:3}  {finding['rule']}: {finding['found']}"


def _recorded(run_dir: RunDir, netns: str, to: str, source: str, device: str) -> Any:
    """What can be said without an agent."""
    from pyambient.agent.explain import Inquiry, completed, explain  # noqa: PLC0415 - not for --help
    from pyambient.agent.locate import record_of  # noqa: PLC0415 - not for --help
    from pyambient.agent.records import RecordStore  # noqa: PLC0415 - not for --help
    from pyambient.netns import Netns  # noqa: PLC0415 - not for --help

    inquiry = Inquiry.parse(to, source, device)
    record = record_of(RecordStore(run_dir.pods).readable()[0], netns)
    with Netns.open(netns) as opened:
        return completed(explain(record, opened, inquiry), None).to_json()
