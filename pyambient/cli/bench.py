"""`pyambient bench`: what an interception costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from .options import common_options, examples, require_root

_BACKENDS: Final = ("bpf", "tc", "nftables", "iptables")
_WORK: Final = ("connections", "ping-pong", "bulk", "dns", "held")
_SIDES: Final = ("client", "server", "both")
_QUICK_SECONDS: Final = 0.2


@click.group("bench", epilog=examples("sudo pyambient bench intercept --quick"))
def command() -> None:
    """Measure what an interception costs."""


@command.command(
    "intercept",
    epilog=examples(
        "sudo pyambient bench intercept --quick",
        "sudo pyambient bench intercept --backend bpf --work connections --rounds 15",
    ),
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(_BACKENDS),
    help="Only this one; may be repeated.  [default: all]",
)
@click.option(
    "--enrolled",
    multiple=True,
    type=click.Choice(_SIDES),
    help="Whose pod is captured; may be repeated.  [default: each in turn]",
)
@click.option("--work", multiple=True, type=click.Choice(_WORK), help="Only this; may be repeated.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(0.05),
    default=1.0,
    show_default=True,
    help="Of each measurement.",
)
@click.option("--quick", is_flag=True, help="One short round with the client's pod enrolled.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("build/bench/intercept.json"),
    show_default=True,
    help="Where the raw numbers go.",
)
@common_options
@click.pass_context
def intercept(  # noqa: PLR0913 - an option each
    ctx: click.Context,
    /,
    *,
    backends: tuple[str, ...],
    enrolled: tuple[str, ...],
    work: tuple[str, ...],
    rounds: int,
    seconds: float,
    quick: bool,
    out: Path,
) -> None:
    """Compare the backends with no proxy and with a proxy that is asked explicitly.

    Each measurement has network namespaces of its own; all that takes part runs on one CPU. The
    proxy is one that does next to nothing, so that it does not hide the differences.
    """
    require_root("bench intercept")
    from pyambient.bench.intercept.settings import Settings  # noqa: PLC0415 - not for --help
    from pyambient.bench.walls import run_apart  # noqa: PLC0415 - not for --help

    settings = Settings(
        out=str(out.absolute()),
        backends=backends or _BACKENDS,
        enrolled=enrolled or (_SIDES[:1] if quick else _SIDES),
        work=work,
        rounds=1 if quick else rounds,
        seconds=_QUICK_SECONDS if quick else seconds,
    )
    ctx.exit(run_apart("pyambient.bench.intercept", [settings.as_text()]))
