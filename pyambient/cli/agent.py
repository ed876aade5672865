"""`pyambient agent`: enrols pods, without a proxy beside it."""

from __future__ import annotations

from pathlib import Path

import click

from pyambient.agent.config import DEFAULT_DRAIN_TIMEOUT, AgentSettings, RunDir

from .options import (
    Invocation,
    bpf_loader_option,
    cgroup_option,
    common_options,
    drain_timeout_option,
    examples,
    existing_cgroup,
    log_format_option,
    log_level_option,
    probe_cgroup_option,
    require_root,
    stop_with_parent_option,
)


@click.command(
    "agent",
    epilog=examples(
        "pyambient agent", "pyambient --run-dir /run/demo agent --cgroup /sys/fs/cgroup/demo"
    ),
)
@cgroup_option
@probe_cgroup_option
@bpf_loader_option
@log_format_option
@log_level_option
@drain_timeout_option(DEFAULT_DRAIN_TIMEOUT)
@stop_with_parent_option
@common_options
@click.pass_context
def command(  # noqa: PLR0913 - a parameter for each option
    ctx: click.Context,
    /,
    *,
    cgroup: Path | None,
    probe_cgroup: Path | None,
    bpf_loader: str,
    log_format: str,
    log_level: str,
    drain_timeout: float,
    stop_with_parent: int | None,
) -> None:
    """Run the agent alone.

    It enrols pods and hands their network namespaces to whatever proxy connects to zds.sock in
    the run directory: 'pyambient proxy', or a ztunnel. Stopped, it leaves pods enrolled.
    """
    from pyambient.agent.agent import run  # noqa: PLC0415 - not for --help
    from pyambient.observe.logs import configure  # noqa: PLC0415 - not for --help

    require_root("agent")
    if stop_with_parent is not None:
        from pyambient.children import stop_with  # noqa: PLC0415 - not for --help

        stop_with(stop_with_parent)
    configure(log_format, log_level)
    run_dir = RunDir(ctx.ensure_object(Invocation).run_dir)
    settings = AgentSettings(
        run_dir,
        existing_cgroup(cgroup),
        drain_timeout=drain_timeout,
        bpf_loader=bpf_loader,
        probe_cgroup=existing_cgroup(probe_cgroup) if probe_cgroup else None,
    )
    run(settings)
    if stop_with_parent is None:
        click.echo(run_dir.farewell("the agent"))
