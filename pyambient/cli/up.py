"""`pyambient up`: agent and proxy as supervised children, in the foreground."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import trio

from pyambient.agent.client import ask
from pyambient.agent.config import DEFAULT_DRAIN_TIMEOUT, AgentSettings, RunDir
from pyambient.agent.lock import AgentLock
from pyambient.children import Child, ChildFailed, module, start
from pyambient.errors import PyambientError, root_cause

from .options import (
    Invocation,
    bpf_loader_option,
    ca_dir_option,
    cgroup_option,
    common_options,
    drain_timeout_option,
    examples,
    existing_cgroup,
    log_format_option,
    log_level_option,
    mesh_option,
    probe_cgroup_option,
    require_root,
    same_node_option,
    trust_domain_option,
    workers_option,
)

_STOP_PATIENCE: Final = 10.0
_POLL: Final = 0.1


@dataclass(frozen=True, slots=True)
class _Settings:
    """What `up` was asked for."""

    run_dir: Path
    cgroup: Path | None
    probe_cgroup: Path | None
    mesh: Path | None
    ca_dir: Path | None
    trust_domain: str
    same_node: str
    workers: int
    log_format: str
    log_level: str
    drain_timeout: float
    bpf_loader: str

    def agent(self) -> list[str]:
        return [
            *self._common("agent"),
            f"--drain-timeout={self.drain_timeout}",
            f"--bpf-loader={self.bpf_loader}",
            *([f"--probe-cgroup={self.probe_cgroup.absolute()}"] if self.probe_cgroup else []),
        ]

    def proxy(self) -> list[str]:
        files = {"--mesh": self.mesh, "--ca-dir": self.ca_dir}
        given = [f"{option}={path.absolute()}" for option, path in files.items() if path]
        return [
            *self._common("proxy"),
            f"--trust-domain={self.trust_domain}",
            f"--same-node={self.same_node}",
            f"--workers={self.workers}",
            *given,
        ]

    def _common(self, command: str) -> list[str]:
        return [
            f"--run-dir={self.run_dir}",
            command,
            *([f"--cgroup={self.cgroup}"] if self.cgroup else []),
            f"--log-format={self.log_format}",
            f"--log-level={self.log_level}",
            f"--stop-with-parent={os.getpid()}",
        ]


@click.command(
    "up",
    epilog=examples(
        "pyambient up",
        "pyambient up --mesh mesh.yaml --trust-domain example.org",
        "pyambient --run-dir /run/demo up --cgroup /sys/fs/cgroup/demo",
    ),
)
@cgroup_option
@probe_cgroup_option
@bpf_loader_option
@mesh_option
@ca_dir_option
@trust_domain_option
@same_node_option
@workers_option
@log_format_option
@log_level_option
@drain_timeout_option(DEFAULT_DRAIN_TIMEOUT)
@common_options
@click.pass_context
def command(ctx: click.Context, /, cgroup: Path | None, **options: object) -> None:
    """Run agent and proxy together, in the foreground.

    Stopped with Ctrl-C or SIGTERM, it stops both; pods stay enrolled, and what they send is
    refused until a proxy runs again or they are unenrolled.
    """
    require_root("up")
    run_dir = ctx.ensure_object(Invocation).run_dir
    settings = _Settings(run_dir=run_dir, cgroup=existing_cgroup(cgroup), **options)  # type: ignore[arg-type]  # click has checked them
    RunDir(run_dir).prepare()
    with AgentLock(RunDir(run_dir)):
        pass  # said here, before a proxy is started that the other agent would take for its own
    try:
        trio.run(_run, settings)
    except BaseExceptionGroup as failures:
        if isinstance(failure := root_cause(failures), ChildFailed):
            ctx.exit(failure.code)
        raise
    _remove_proxy_cgroup(settings)
    _tidy(RunDir(run_dir), settings.cgroup)
    click.echo(RunDir(run_dir).farewell("pyambient"))


def _tidy(run_dir: RunDir, cgroup: Path | None) -> None:
    """Remove the proxy's cgroup, but not from under pods whose programs are attached to it."""
    if cgroup is not None and not run_dir.enrolled():
        with contextlib.suppress(OSError):
            (cgroup / "pyambient-proxy").rmdir()


def _remove_proxy_cgroup(settings: _Settings) -> None:
    """Without an enrolled pod nothing is attached to the proxy's cgroup: it goes like the rest."""
    run_dir = RunDir(settings.run_dir)
    proxy_cgroup = AgentSettings(run_dir, settings.cgroup).site.proxy_cgroup
    if proxy_cgroup is not None and not any(run_dir.pods.glob("*.json")):
        with contextlib.suppress(OSError):  # another proxy may live in it
            proxy_cgroup.rmdir()


async def _run(settings: _Settings) -> None:
    """Keep both children running until a signal asks to stop."""
    ready = trio.Event()
    agent = _child("agent", settings.agent(), ready)
    proxy = _child("proxy", settings.proxy(), ready)
    async with trio.open_nursery() as signal_handling:
        async with trio.open_nursery() as nursery:
            children = (agent, proxy)
            await signal_handling.start(_obey_signals, nursery.cancel_scope, children)
            nursery.start_soon(agent.keep_running)
            nursery.start_soon(proxy.keep_running)
            nursery.start_soon(_announce, RunDir(settings.run_dir), agent, proxy, ready)
        signal_handling.cancel_scope.cancel()


def _child(name: str, words: list[str], ready: trio.Event) -> Child:
    """A command of pyambient in a process of its own."""
    begin = partial(start, module("pyambient", *words))
    return Child(name, begin, _STOP_PATIENCE, ready, partial(click.echo, err=True))


async def _obey_signals(
    scope: trio.CancelScope,
    children: Iterable[Child],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Stop at the first signal, at once at the second."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        await anext(signals)
        scope.cancel()
        async for _ in signals:
            for child in children:
                child.kill()


async def _announce(run_dir: RunDir, agent: Child, proxy: Child, ready: trio.Event) -> None:
    """Say so when our agent answers and our proxy has taken its pods."""
    while True:
        status = await trio.to_thread.run_sync(_status, run_dir)
        if status is not None and _is_ours(status, agent, proxy):
            break
        await trio.sleep(_POLL)
    ready.set()
    count = len(status["pods"])
    click.echo(f"pyambient is ready in {run_dir.path}: {count} pods enrolled, press Ctrl-C to stop")


def _is_ours(status: dict[str, Any], agent: Child, proxy: Child) -> bool:
    return status["agent"]["pid"] == agent.pid and proxy.pid in status["proxies"]


def _status(run_dir: RunDir) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = ask(run_dir, "status")
    except PyambientError:
        return None
    return answer
