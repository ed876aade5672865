"""`pyambient proxy`: serves the pods that an agent hands over."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from pyambient.children import module
from pyambient.errors import PyambientError
from pyambient.proxy.settings import ProxySettings

from .options import (
    Invocation,
    ca_dir_option,
    cgroup_option,
    common_options,
    examples,
    existing_cgroup,
    log_format_option,
    log_level_option,
    mesh_option,
    require_root,
    same_node_option,
    stop_with_parent_option,
    trust_domain_option,
    workers_option,
)


@click.command(
    "proxy",
    epilog=examples(
        "pyambient proxy",
        "pyambient proxy --workers 4",
        "pyambient --run-dir /run/demo proxy --cgroup /sys/fs/cgroup/demo --mesh mesh.yaml",
    ),
)
@cgroup_option
@mesh_option
@ca_dir_option
@trust_domain_option
@same_node_option
@workers_option
@log_format_option
@log_level_option
@stop_with_parent_option
@common_options
@click.pass_context
def command(  # noqa: PLR0913 - a parameter for each option
    ctx: click.Context,
    /,
    *,
    cgroup: Path | None,
    mesh: Path | None,
    ca_dir: Path | None,
    trust_domain: str,
    same_node: str,
    workers: int,
    log_format: str,
    log_level: str,
    stop_with_parent: int | None,
) -> None:
    """Run the proxy alone.

    It connects to zds.sock in the run directory and serves the pods of the agent there. It runs
    in the cgroup pyambient-proxy below --cgroup, by which the BPF programs know it.
    """
    require_root("proxy")
    # A socket belongs for life to the cgroup it was made in, so this comes before all else.
    _join(existing_cgroup(cgroup))
    if stop_with_parent is not None:
        from pyambient.children import stop_with  # noqa: PLC0415 - not for --help

        stop_with(stop_with_parent)
    invocation = ctx.ensure_object(Invocation)
    _become(
        ProxySettings(
            run_dir=invocation.run_dir,
            ca_dir=ca_dir or invocation.run_dir / "ca",
            trust_domain=trust_domain,
            mesh=mesh,
            log_format=log_format,
            log_level=log_level,
            direct=same_node == "direct",
            workers=workers,
            debug=invocation.debug,
        )
    )


def _become(settings: ProxySettings) -> NoReturn:
    """Go on in this process, but without what the command line has loaded."""
    sys.stdout.flush()
    line = module("pyambient.proxy", settings.to_json())
    os.execv(sys.executable, line)  # noqa: S606 - itself


def _join(cgroup: Path | None) -> None:
    """Move this process into the proxy's cgroup; without cgroup2 there is none to join."""
    if cgroup is None:
        return
    own = cgroup / "pyambient-proxy"
    try:
        own.mkdir(exist_ok=True)
        (own / "cgroup.procs").write_text("0", encoding="ascii")
    except OSError as error:
        raise PyambientError(
            f"the proxy cannot join {own}: {error.strerror}", "give another --cgroup"
        ) from None
