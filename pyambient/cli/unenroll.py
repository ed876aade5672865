"""`pyambient unenroll`: network namespaces out of the mesh, with or without an agent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import click

from pyambient.agent.client import AgentAbsent, ask
from pyambient.agent.config import MAX_DRAIN_TIMEOUT, RunDir
from pyambient.agent.locate import path_of, record_of
from pyambient.agent.lock import AgentLock
from pyambient.agent.records import Record, RecordStore
from pyambient.errors import PyambientError, UsageError

from .options import Invocation, common_options, drain_timeout_option, examples, require_root

# What the agent may need beside the drain, in seconds.
_PATIENCE: Final = 60.0
_T = TypeVar("_T")


@click.command(
    "unenroll",
    epilog=examples(
        "pyambient unenroll shop",
        "pyambient unenroll shop --drain-timeout 5",
        "pyambient unenroll --all",
    ),
)
@click.argument("netns", required=False)
@click.option("--all", "everything", is_flag=True, help="Every enrolled network namespace.")
@drain_timeout_option(None)
@common_options
@click.pass_context
def command(
    ctx: click.Context, /, *, netns: str | None, everything: bool, drain_timeout: float | None
) -> None:
    """Take the network namespace NETNS out of the mesh, or all of them.

    New connections are direct at once; those through the proxy may go on until the drain timeout.
    It works without an agent, too: then nobody can wait for connections that the proxy still
    holds.
    """
    if everything == (netns is not None):
        raise click.UsageError("Give either NETNS or --all.", ctx)
    require_root("unenroll")
    run_dir = RunDir(ctx.ensure_object(Invocation).run_dir)
    try:
        status = ask(run_dir, "status")
    except AgentAbsent:
        _without_agent(run_dir, netns)
        return
    names = [pod["path"] for pod in status["pods"]] if netns is None else [path_of(netns)]
    _free_each(names, lambda name: _through_agent(run_dir, name, drain_timeout))


def _through_agent(run_dir: RunDir, netns: str, drain_timeout: float | None) -> str:
    patience = _PATIENCE + (MAX_DRAIN_TIMEOUT if drain_timeout is None else drain_timeout)
    answer = ask(run_dir, "unenroll", patience, netns=netns, drain_timeout=drain_timeout)
    cut = answer["connections_cut"]
    return f"unenrolled {answer['pod']['netns']}" + (f" ({cut} connections cut)" if cut else "")


def _without_agent(run_dir: RunDir, netns: str | None) -> None:
    store = RecordStore(run_dir.pods)
    if not run_dir.path.is_dir():
        if netns is None:
            return
        raise UsageError(f"{netns} is not enrolled", f"there is no {run_dir.path}")
    with AgentLock(run_dir):
        records = store.all()
        chosen = records if netns is None else [record_of(records, netns)]
        _free_each(chosen, lambda record: _from_record(record, store))


def _from_record(record: Record, store: RecordStore) -> str:
    from pyambient.agent.interception import free  # noqa: PLC0415 - loads the backends

    free(record, store)
    return f"unenrolled {record.netns.label} (without an agent: nothing was drained)"


def _free_each(items: list[_T], free: Callable[[_T], str]) -> None:
    """Free them one by one; a failure does not keep the others, and is raised at the end."""
    failures: list[PyambientError] = []
    for item in items:
        try:
            click.echo(free(item))
        except PyambientError as error:
            failures.append(error)
    for failure in failures[1:]:
        click.echo(f"error: {failure}", err=True)
    if failures:
        raise failures[0]
