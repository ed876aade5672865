"""`pyambient check`: what this machine can do, found out by trying."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import click

from pyambient.agent.config import AgentSettings
from pyambient.errors import PyambientError
from pyambient.model.backends import BACKENDS, WITH_PROGRAMS

from .options import (
    cgroup_option,
    common_options,
    examples,
    existing_cgroup,
    output_option,
    require_root,
)

_UNSUPPORTED: Final = 3
# Bits of CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN and CAP_BPF (capabilities(7)).
_CAPABILITIES: Final = {"NET_ADMIN": 12, "NET_RAW": 13, "SYS_ADMIN": 21, "BPF": 39}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing tried. `hint` says what to do about a problem, or what is used instead."""

    group: str
    name: str
    present: bool
    needed: bool
    minimum_kernel: str = ""
    problem: str = ""
    hint: str = ""

    def line(self) -> str:
        """One line for people."""
        mark = "✔" if self.present else "✘" if self.needed else "‼"
        since = f" (Linux {self.minimum_kernel})" if self.minimum_kernel else ""
        reasons = "; ".join(filter(None, (self.problem, self.hint)))
        return f"  {mark} {self.name}{since}" + (f": {reasons}" if not self.present else "")


@click.command("check", epilog=examples("pyambient check", "pyambient check -o json"))
@cgroup_option
@output_option
@common_options
@click.pass_context
def command(ctx: click.Context, /, *, cgroup: Path | None, output: str) -> None:
    """Show what this machine can do.

    Each feature is tried, in a cgroup and a network namespace made for the moment. Exits with 0
    if there is a backend that works, else with 3.
    """
    require_root("check")
    findings = [*_machine(), *_bpf(existing_cgroup(cgroup)), *_netfilter()]
    backends = {
        group: all(f.present for f in findings if f.group in ("machine", group) and f.needed)
        for group in BACKENDS
    }
    if output == "json":
        items = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps({"backends": backends, "checks": items}, indent=2))
    else:
        _print(findings, backends)
    if not any(backends.values()):
        ctx.exit(_UNSUPPORTED)


def _print(findings: list[Finding], backends: dict[str, bool]) -> None:
    for group in ("machine", *backends):
        click.echo(group if group == "machine" else f"backend {group}")
        for finding in findings:
            if finding.group == group:
                click.echo(finding.line())
    usable = [backend for backend, works in backends.items() if works]
    click.echo(f"--backend auto takes {usable[0]}" if usable else "no backend works here")


def _machine() -> Iterator[Finding]:
    """What every backend needs."""
    missing = _missing_capabilities()
    yield Finding(
        "machine",
        "capabilities " + " ".join(_CAPABILITIES),
        present=not missing,
        needed=True,
        problem=f"without {' '.join(missing)}",
        hint="run it as root, outside a container or with these capabilities",
    )


def _missing_capabilities() -> list[str]:
    """Capabilities that are not in the effective set (proc_pid_status(5))."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
            return [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    return list(_CAPABILITIES)


def _bpf(cgroup: Path | None) -> Iterator[Finding]:
    from pyambient.intercept.mounts import try_bpffs  # noqa: PLC0415 - not for --help
    from pyambient.intercept.probe import probe  # noqa: PLC0415 - not for --help

    for backend in WITH_PROGRAMS:
        for feature in probe(cgroup, backend):
            yield Finding(
                backend,
                feature.name,
                feature.present,
                feature.needed,
                feature.minimum_kernel,
                feature.error,
                f"instead: {feature.instead}",
            )
        yield _attempt(backend, "bpffs", partial(try_bpffs, AgentSettings().bpffs))
    yield from _foreign(cgroup)
    bcc = _attempt("bpf", "bcc and kernel headers, for --bpf-loader bcc", _compile_by_bcc)
    yield dataclasses.replace(bcc, needed=False)


def _foreign(cgroup: Path | None) -> Iterator[Finding]:
    """Other tools' hooks: one line for each, those that are in our way as what is missing."""
    from pyambient.intercept.foreign_hooks import (  # noqa: PLC0415 - likewise
        foreign_hooks,
        is_in_the_way,
    )
    from pyambient.intercept.node_hooks import PROGRAM_PREFIX  # noqa: PLC0415 - not for --help

    if cgroup is None:
        return
    try:
        found = foreign_hooks(cgroup, PROGRAM_PREFIX)
    except OSError:
        return  # without bpf(2) there are none
    for hook in found:
        blocks = is_in_the_way(hook, cgroup)
        hint = "turn it off, or use another backend" if blocks else "see docs/backends.md"
        yield Finding(
            "bpf",
            "no other tool decides where apps connect to",
            present=False,
            needed=blocks,
            problem=str(hook),
            hint=hint,
        )


def _compile_by_bcc() -> None:
    from pyambient.intercept.bcc_object import load  # noqa: PLC0415 - LLVM
    from pyambient.intercept.loader import Constants  # noqa: PLC0415 - not for --help

    load("bind", Constants(), {}).close()


def _netfilter() -> Iterator[Finding]:
    for backend, name, ipv6 in (
        ("nftables", "rules in a table of family ip", False),
        ("nftables", "rules in a table of family ip6", True),
        ("iptables", "rules of iptables", False),
        ("iptables", "rules of ip6tables", True),
    ):
        yield _attempt(backend, name, partial(_try_rules, backend, ipv6=ipv6))


def _try_rules(backend: str, *, ipv6: bool) -> None:
    """Enrol an empty network namespace by this backend, and free it."""
    from pyambient.intercept.iptables import Iptables  # noqa: PLC0415 - not for --help
    from pyambient.intercept.nftables import Nftables  # noqa: PLC0415 - not for --help
    from pyambient.intercept.scratch import try_out  # noqa: PLC0415 - likewise

    try_out(Nftables() if backend == "nftables" else Iptables(), ipv6=ipv6)


def _attempt(group: str, name: str, run: Callable[[], None]) -> Finding:
    """A finding of something that works if it does not raise."""
    try:
        run()
    except PyambientError as error:
        return Finding(group, name, present=False, needed=True, problem=error.what, hint=error.then)
    except OSError as error:
        return Finding(group, name, present=False, needed=True, problem=str(error))
    return Finding(group, name, present=True, needed=True)
