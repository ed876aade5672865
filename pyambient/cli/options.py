"""Options that several commands share, and what commands have in common."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from pyambient.agent.config import DEFAULT_RUN_DIR, MAX_DRAIN_TIMEOUT
from pyambient.errors import NeedsRoot, UsageError
from pyambient.model.numbers import MAX_WORKERS

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(slots=True)
class Invocation:
    """What was said before or after the command's name, and counts for any command."""

    run_dir: Path = DEFAULT_RUN_DIR
    debug: bool = False


def _note_run_dir(ctx: click.Context, _: click.Parameter, value: Path | None) -> None:
    if value is not None:
        ctx.ensure_object(Invocation).run_dir = value.absolute()


def _note_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
    if value:
        ctx.ensure_object(Invocation).debug = True


def common_options(function: _F) -> _F:
    """`--run-dir` and `--debug`, which may stand before and after a command's name."""
    run_dir = click.option(
        "--run-dir",
        type=click.Path(path_type=Path),
        expose_value=False,
        callback=_note_run_dir,
        help=f"Where agent, proxy and commands meet.  [default: {DEFAULT_RUN_DIR}]",
    )
    debug = click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_note_debug,
        help="Show the traceback of a failure.",
    )
    return run_dir(debug(function))


cgroup_option = click.option(
    "--cgroup",
    type=click.Path(path_type=Path),
    help="The cgroup2 directory that holds apps and proxy.  [default: the root of cgroup2]",
)
probe_cgroup_option = click.option(
    "--probe-cgroup",
    type=click.Path(path_type=Path),
    help="The cgroup of what probes the pods' health from this node, such as kubelet's: what it"
    " connects to is exempt from policy.  [default: all of the node's own network namespace]",
)
mesh_option = click.option(
    "--mesh",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file of services, policies and remote workloads, in ztunnel's local format.",
)
ca_dir_option = click.option(
    "--ca-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the embedded CA keeps its root.  [default: ca in the run directory]",
)
trust_domain_option = click.option(
    "--trust-domain", default="cluster.local", show_default=True, help="Of every identity here."
)
same_node_option = click.option(
    "--same-node",
    type=click.Choice(["hbone", "direct"]),
    default="hbone",
    show_default=True,
    help="How pods of this node reach one another: by a tunnel, or without TLS inside the proxy.",
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(1, MAX_WORKERS),
    default=1,
    show_default=True,
    help="How many processes the proxy serves the pods with.",
)
bpf_loader_option = click.option(
    "--bpf-loader",
    type=click.Choice(["libbpf", "bcc"]),
    default="libbpf",
    show_default=True,
    help="Load compiled BPF programs, or have bcc compile them here.",
)
log_format_option = click.option(
    "--log-format",
    type=click.Choice(["plain", "json"]),
    default="plain",
    show_default=True,
    help="How log lines look, the access log included.",
)
log_level_option = click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warn", "error"]),
    default="info",
    show_default=True,
    help="The least important lines to log.",
)
output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="For people, or for programs.",
)


def drain_timeout_option(default: float | None) -> Callable[[_F], _F]:
    """`--drain-timeout`; without a default it is the agent's."""
    return click.option(
        "--drain-timeout",
        type=click.FloatRange(0, MAX_DRAIN_TIMEOUT),
        default=default,
        show_default=default is not None,
        metavar="SECONDS",
        help="How long connections may go on when their pod is unenrolled.",
    )


# Ends an agent or a proxy whose `pyambient up` was killed.
stop_with_parent_option = click.option(
    "--stop-with-parent", type=int, hidden=True, metavar="PID", help="End when this process does."
)


def examples(*lines: str) -> str:
    """A help text's end."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def require_root(command: str) -> None:
    if os.geteuid() != 0:
        raise NeedsRoot(f"pyambient {command}")


def existing_cgroup(cgroup: Path | None) -> Path | None:
    """The cgroup to hook: the one given, else the root of cgroup2; None where there is none."""
    from pyambient.intercept.mounts import find_cgroup2_root, is_on  # noqa: PLC0415 - not for --help

    if cgroup is None:
        return find_cgroup2_root()
    if not cgroup.is_dir() or not is_on(cgroup, "cgroup2"):
        raise UsageError(
            f"{cgroup} is not a directory of cgroup2",
            f"make it below {find_cgroup2_root() or 'a cgroup2 mount'}, or leave --cgroup out",
        )
    return cgroup.absolute()
