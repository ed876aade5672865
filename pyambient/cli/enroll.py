"""`pyambient enroll`: one network namespace into the mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from pyambient.agent.client import ask
from pyambient.agent.config import AgentSettings, RunDir
from pyambient.agent.locate import path_of
from pyambient.intercept.options import CLOSE, KEEP
from pyambient.model.backends import BACKENDS

from .capture import capture_options
from .options import (
    Invocation,
    cgroup_option,
    common_options,
    examples,
    existing_cgroup,
    require_root,
)
from .status import existing_lines, moved_lines

# A loader that compiles takes a second of CPU for each program, on a node that may be busy.
_PATIENCE: Final = 240.0


@click.command(
    "enroll",
    epilog=examples(
        "pyambient enroll shop --namespace default --service-account shop",
        "pyambient enroll pid:4711 --name shop-1 --namespace default --service-account shop",
        "pyambient enroll shop --namespace default --service-account shop --dry-run",
        "pyambient enroll db --namespace default --service-account db --exclude-inbound-ports 9090",
    ),
)
@click.argument("netns")
@click.option("--namespace", default="", help="The namespace of its identity.")
@click.option("--service-account", default="", help="The service account of its identity.")
@click.option("--name", default="", help="The workload's name.  [default: the netns's]")
@click.option(
    "--backend",
    type=click.Choice(["auto", *BACKENDS]),
    help="How its traffic is captured.  [default: auto, or as it is]",
)
@click.option(
    "--existing",
    type=click.Choice([KEEP, CLOSE]),
    default=KEEP,
    show_default=True,
    help="Let TCP connections from before go on past the proxy, or end them.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done; no agent is needed.")
@capture_options
@cgroup_option
@common_options
@click.pass_context
def command(  # noqa: PLR0913 - a parameter for each option
    ctx: click.Context,
    /,
    *,
    netns: str,
    namespace: str,
    service_account: str,
    name: str,
    backend: str | None,
    existing: str,
    dry_run: bool,
    cgroup: Path | None,
    options: dict[str, Any],
) -> None:
    """Put the network namespace NETNS into the mesh.

    NETNS is a name from 'ip netns', a path, or pid:N. What its processes connect to from now on
    goes through the proxy, and so does what connects to them, unless the options below leave it
    out. A list is as 22,8000-8100 or 10.0.0.0/8,fd00::1, or @FILE. --cgroup counts for --dry-run
    only: otherwise it is the agent's.

    A namespace that is enrolled already is brought in line: it gets the backend and the options
    that are named, and keeps all others. Its connections go on.
    """
    require_root("enroll")
    run_dir = RunDir(ctx.ensure_object(Invocation).run_dir)
    request = {
        "netns": path_of(netns),
        "name": name,
        "namespace": namespace,
        "service_account": service_account,
        "backend": backend or "",
        "existing": existing,
    }
    if dry_run:
        settings = AgentSettings(run_dir, existing_cgroup(cgroup))
        click.echo(_dry_run(settings, options, **request), nl=False)
        return
    pod = ask(run_dir, "enroll", _PATIENCE, **request, options=options)
    addresses = " ".join(pod["addresses"]) or "no address yet"
    click.echo(
        f"enrolled {pod['netns']} as {pod['namespace']}/{pod['name']}"
        f" ({pod['backend']}, {addresses})"
    )
    for line in (*moved_lines([pod]), *existing_lines([pod])):
        click.echo(line)


def _dry_run(settings: AgentSettings, choices: dict[str, Any], **request: str) -> str:
    """What the enrolment would add, after the checks that come before it."""
    from pyambient.agent.enrolled import Enrolled, EnrolRequest  # noqa: PLC0415 - loads trio
    from pyambient.agent.interception import make_plan  # noqa: PLC0415 - loads the backends
    from pyambient.agent.locate import refuse_enrolled  # noqa: PLC0415 - beside its caller
    from pyambient.agent.records import RecordStore  # noqa: PLC0415 - beside its caller
    from pyambient.intercept.holders import holders  # noqa: PLC0415 - loads the backends

    pod = Enrolled.opened(EnrolRequest(**request, choices=choices))
    with pod.netns:
        records, _ = RecordStore(settings.run_dir.pods).readable()
        refuse_enrolled(records, pod.netns)
        record = pod.record
        plan = make_plan(pod.target, record.backend, settings.site, record.options)
        taken = [
            f"# port {port} is taken by {holders(pod.netns, port)}: the proxy takes {instead}\n"
            for port, instead in plan.network.ports.moved.items()
        ]
        return "".join(taken) + plan.render()
