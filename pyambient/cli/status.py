"""`pyambient status`: what is enrolled, and who serves it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import click

from pyambient.agent.client import AgentAbsent, ask
from pyambient.agent.config import RunDir

from .options import Invocation, common_options, examples, output_option, require_root

_COLUMNS = {
    "NETNS": "netns",
    "NAME": "name",
    "NAMESPACE": "namespace",
    "SERVICE-ACCOUNT": "service_account",
    "BACKEND": "backend",
    "STATE": "state",
    "ADDRESSES": "addresses",
}


@click.command(
    "status",
    epilog=examples("pyambient status", "pyambient status -o json | jq '.pods[].addresses'"),
)
@output_option
@common_options
@click.pass_context
def command(ctx: click.Context, /, *, output: str) -> None:
    """Show what is enrolled.

    Without an agent, what its records say is shown.
    """
    require_root("status")
    run_dir = RunDir(ctx.ensure_object(Invocation).run_dir)
    try:
        status = ask(run_dir, "status")
    except AgentAbsent as absent:
        status = _recorded(run_dir)
        click.echo(f"note: {absent.what}", err=True)
    if output == "json":
        click.echo(json.dumps(status, indent=2))
        return
    for line in table([_row(pod) for pod in status["pods"]], list(_COLUMNS)):
        click.echo(line)
    pods = status["pods"]
    for line in (
        *_workers(pods),
        *_choices(pods),
        *moved_lines(pods),
        *existing_lines(pods),
        *_leaks(pods),
    ):
        click.echo(line)
    if status["agent"] and not status["proxies"]:
        click.echo("note: no proxy is connected; what the pods send is refused", err=True)


def _recorded(run_dir: RunDir) -> dict[str, Any]:
    from pyambient.agent.leaks import Leaks, describe_leaks  # noqa: PLC0415 - only without an agent
    from pyambient.agent.locate import find  # noqa: PLC0415 - only without an agent
    from pyambient.agent.records import RecordStore  # noqa: PLC0415 - only without an agent
    from pyambient.agent.status import describe  # noqa: PLC0415 - only without an agent

    records, errors = RecordStore(run_dir.pods).readable()
    for error in errors:
        click.echo(f"error: {error}", err=True)
    pods = []
    for record in records:
        with find(record.netns) or contextlib.nullcontext() as netns:
            pods.append({**describe(record), "guard": describe_leaks(record, netns, Leaks())})
    return {"agent": None, "proxies": [], "pods": pods}


def _workers(pods: list[dict[str, Any]]) -> Iterator[str]:
    """The proxy's workers, if it has several: the same in each pod but for their connections."""
    counted: dict[int, int] = {}
    pids: dict[int, int | None] = {}
    for pod in pods:
        for worker in (pod.get("proxy") or {}).get("workers", ()):
            number = worker["number"]
            pids[number] = worker["pid"]
            counted[number] = counted.get(number, 0) + worker["connections"]
    for number, pid in pids.items():
        running = f"pid {pid}, connections: {counted[number]}" if pid else "not running"
        yield f"worker {number}: {running}"


def _choices(pods: list[dict[str, Any]]) -> Iterator[str]:
    """What is captured of the pods, where that is not everything."""
    from pyambient.intercept.options import CaptureOptions  # noqa: PLC0415 - not for --help

    for pod in pods:
        for line in CaptureOptions.from_json(pod["options"]).in_words():
            yield f"{pod['netns']}: {line}"


def moved_lines(pods: list[dict[str, Any]]) -> Iterator[str]:
    """On which other ports the proxy listens, where somebody has its own."""
    from pyambient.model.ports import Ports  # noqa: PLC0415 - not for --help

    for pod in pods:
        for well_known, port in Ports(**pod["ports"]).moved.items():
            yield f"{pod['netns']}: the proxy listens on {port}, as {well_known} was taken"


def existing_lines(pods: list[dict[str, Any]]) -> Iterator[str]:
    """How many connections are not captured, as they are older than the enrolment."""
    for pod in pods:
        if count := pod.get("existing"):
            many = "connection" if count == 1 else "connections"
            yield f"{pod['netns']}: {count} {many} from before the enrolment past the proxy"


def _leaks(pods: list[dict[str, Any]]) -> Iterator[str]:
    """What the pods' guards dropped, and which sockets could send past them."""
    for pod in pods:
        guard = pod.get("guard") or {"dropped": {}, "bypasses": {}, "last": []}
        for reason, count in guard["dropped"].items():
            yield f"{pod['netns']}: {count} packets past the proxy: {reason}"
        for drop in guard["last"]:
            ends = f"{drop['source']} > {drop['destination']}"
            yield f"{pod['netns']}: {ends} {drop['reason']}, {drop['seconds_ago']:.0f} s ago"
        for kind, count in guard["bypasses"].items():
            yield f"{pod['netns']}: {count} times an app had a socket past the guard: {kind}"


def _row(pod: dict[str, Any]) -> list[str]:
    cells = [pod[key] for key in _COLUMNS.values()]
    return [" ".join(cell) if isinstance(cell, list) else cell for cell in cells]


def table(rows: list[list[str]], header: list[str]) -> list[str]:
    """Aligned lines, two spaces between columns, "-" for what is empty."""
    lines = [header, *([cell or "-" for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
