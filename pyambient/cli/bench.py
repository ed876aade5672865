"""`pyambient bench`: what an interception costs on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

import click

from pyambient.bench.intercept.settings import QUICK, WHOLE

from .options import common_options, examples, require_root

_PARTS: Final = ("traffic", "exclusions", "pods", "enrolment")
_RESULTS: Final = Path("build/bench/intercept.json")
_PAGE: Final = Path("build/bench/intercept.html")


@click.group(
    "bench",
    epilog=examples("sudo pyambient bench intercept --quick", "pyambient bench report"),
)
def command() -> None:
    """Measure what an interception costs."""


@command.command(
    "intercept",
    epilog=examples(
        "sudo pyambient bench intercept --quick",
        "sudo pyambient bench intercept --backend bpf --work connections --rounds 15",
        "sudo pyambient bench intercept --part enrolment --backend bpf --add --check",
    ),
)
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(_PARTS),
    help="Only this; may be repeated.  [default: all]",
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(WHOLE.backends),
    help="Only this one; may be repeated.  [default: all]",
)
@click.option(
    "--enrolled",
    multiple=True,
    type=click.Choice(WHOLE.enrolled),
    help="Whose pod is captured; may be repeated. With 'others' it is neither of the two that"
    " speak.  [default: each in turn]",
)
@click.option(
    "--proxy",
    "proxies",
    multiple=True,
    type=click.Choice(WHOLE.proxies),
    help="Who serves what is captured: a proxy that does next to nothing, or pyambient's own; may"
    " be repeated.  [default: both]",
)
@click.option(
    "--work", multiple=True, type=click.Choice(WHOLE.work), help="Only this; may be repeated."
)
@click.option("--rounds", type=click.IntRange(1), help=f"[default: {WHOLE.rounds}]")
@click.option(
    "--seconds",
    type=click.FloatRange(0.05),
    help=f"Of each measurement.  [default: {WHOLE.seconds:g}]",
)
@click.option("--quick", is_flag=True, help="A little of everything, once: does it work?")
@click.option("--add", is_flag=True, help="Keep what --out has, and add to it.")
@click.option("--check", is_flag=True, help="Exit with 1 if a bar is missed, and name it.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=_RESULTS,
    show_default=True,
    help="Where the raw numbers go.",
)
@common_options
@click.pass_context
def intercept(  # noqa: PLR0913 - an option each
    ctx: click.Context,
    /,
    *,
    parts: tuple[str, ...],
    backends: tuple[str, ...],
    enrolled: tuple[str, ...],
    proxies: tuple[str, ...],
    work: tuple[str, ...],
    rounds: int | None,
    seconds: float | None,
    quick: bool,
    add: bool,
    check: bool,
    out: Path,
) -> None:
    """Compare the backends with no proxy and with a proxy that is asked explicitly.

    Each measurement has network namespaces of its own; all that takes part runs on one CPU. Then
    the cost is measured against the number of excluded CIDRs and of enrolled pods, and how long an
    enrolment takes.
    """
    require_root("bench intercept")
    from pyambient.bench.walls import run_apart  # noqa: PLC0415 - not for --help

    scale = QUICK if quick else WHOLE
    chosen = parts or _PARTS
    settings = dataclasses.replace(
        scale,
        out=str(out.absolute()),
        backends=backends or scale.backends,
        enrolled=enrolled or scale.enrolled,
        proxies=proxies or scale.proxies,
        work=(work or scale.work) if "traffic" in chosen else (),
        excluded=scale.excluded if "exclusions" in chosen else (),
        pods=scale.pods if "pods" in chosen else (),
        places=scale.places if "enrolment" in chosen else (),
        rounds=rounds or scale.rounds,
        seconds=seconds or scale.seconds,
        add=add,
        check=check,
    )
    ctx.exit(run_apart("pyambient.bench.intercept", [settings.as_text()]))


@command.command(
    "report",
    epilog=examples("pyambient bench report", "pyambient bench report --out /tmp/intercept.html"),
)
@click.option(
    "--in",
    "source",
    type=click.Path(dir_okay=False, path_type=Path),
    default=_RESULTS,
    show_default=True,
    help="What 'bench intercept' wrote.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=_PAGE,
    show_default=True,
    help="Where the page goes.",
)
@common_options
def report(source: Path, out: Path) -> None:
    """Draw what was measured: one page of HTML that needs nothing else, and tables of text.

    Needs matplotlib: pip install 'pyambient[report]'.
    """
    from pyambient.bench.intercept.samples import read  # noqa: PLC0415 - not for --help
    from pyambient.bench.intercept.table import render, verdicts  # noqa: PLC0415 - not for --help
    from pyambient.bench.rounds import Results  # noqa: PLC0415 - not for --help

    content = read(source)
    results = Results()
    results.samples = content["samples"]
    click.echo(f"{render(results)}\n{verdicts(results)}")
    from pyambient.bench.intercept.page import page  # noqa: PLC0415 - needs matplotlib

    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(content, results), "utf-8")
    click.echo(f"drawn: {out}")
