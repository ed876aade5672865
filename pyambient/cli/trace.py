"""`pyambient trace`: what the interception decides, while it decides it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import click

from pyambient.agent.config import RunDir

from .options import Invocation, common_options, examples, output_option, require_root

if TYPE_CHECKING:
    from pyambient.agent.trace import Batch, Trace

_STDOUT = 1


@click.command(
    "trace",
    epilog=examples(
        "pyambient trace",
        "pyambient trace shop",
        "pyambient trace shop -o json | jq 'select(.decision == \"refused\")'",
    ),
)
@click.argument("netns", required=False)
@output_option
@common_options
@click.pass_context
def command(ctx: click.Context, /, *, netns: str | None, output: str) -> None:
    """Show what the interception decides, as it happens: of NETNS, or of every pod.

    A line for each connection, query or packet that was captured, excluded, refused or dropped,
    until ^C; with -o json an object a line. Pods with the backends bpf and tc are traced. A reader
    that is too slow loses events, and is told how many. Works without an agent, too.
    """
    require_root("trace")
    from pyambient.agent.trace import Trace  # noqa: PLC0415 - not for --help

    printer = Printer(as_json=output == "json")
    trace = Trace(RunDir(ctx.ensure_object(Invocation).run_dir), netns, printer.show)
    for line in _notes(trace, netns):
        click.echo(line, err=True)
    _run(trace)
    click.echo(f"{printer.shown} events shown, {printer.lost} lost", err=True)


def _notes(trace: Trace, netns: str | None) -> list[str]:
    """What to know before the first event."""
    attached = trace.attach()
    untraced = [] if netns else trace.untraced()
    lines = [f"tracing {netns or 'every pod'}; ^C ends it"] if attached else []
    if not attached:
        lines.append("note: no pod is enrolled with backend bpf or tc; waiting for one")
    if untraced:
        lines.append(f"note: backends that are not traced have {', '.join(untraced)}")
    return lines


def _run(trace: Trace) -> None:
    import signal  # noqa: PLC0415 - not for --help

    import trio  # noqa: PLC0415 - not for --help

    async def until_signal() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trace.run)
                async for _ in signals:
                    nursery.cancel_scope.cancel()
                    break

    trio.run(until_signal)


class Printer:
    """Writes batches to standard output, and counts."""

    def __init__(self, *, as_json: bool) -> None:
        self.shown = 0
        self.lost = 0
        self._as_json = as_json

    def show(self, batch: Batch) -> None:
        """Write without Python's buffer: its lock would hold up the end while a pager waits."""
        text = "".join(f"{line}\n" for line in self._lines(batch))
        data = memoryview(text.encode())
        while data:
            data = data[os.write(_STDOUT, data) :]
        self.shown += len(batch.events)
        self.lost += batch.lost

    def _lines(self, batch: Batch) -> list[str]:
        if self._as_json:
            lines = [json.dumps(traced.to_json()) for traced in batch.events]
            lost = json.dumps({"lost": batch.lost, "paused": round(batch.paused, 3)})
            return [*lines, lost] if batch.lost or batch.paused else lines
        lines = [str(traced) for traced in batch.events]
        if batch.lost:
            lines.append(f"lost {batch.lost} events: this reader is too slow")
        if batch.paused:
            lines.append(f"traced nothing for {batch.paused:.1f} s: this process was stopped")
        return lines
