"""The command lines of build-box, run and test-kernels."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from . import cache, checkout, kernels, machine, matrix
from .box import box
from .errors import BedError
from .guest import guest
from .selection import Extent

_FAILED = 125  # as env(1) and timeout(1) have it: we failed, not the command
_TIMED_OUT = 124
_INTERRUPTED = 130


def _guarded(program: str, action: Callable[[], int]) -> int:
    """Run `action`; errors become one line, and signals leave no guest behind."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return action()
    except BedError as error:
        sys.stderr.write(f"vagrant/{program}: {error}\n")
        return _TIMED_OUT if isinstance(error, machine.TimedOut) else _FAILED
    except PermissionError as error:
        remedy = "use sudo, or a PYAMBIENT_CACHE and --results that this user may use"
        sys.stderr.write(f"vagrant/{program}: {error.filename}: {error.strerror}; {remedy}\n")
        return _FAILED
    except (KeyboardInterrupt, BrokenPipeError):
        return _INTERRUPTED


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def run(arguments: Sequence[str] | None = None) -> int:
    """`vagrant/run`: one command in one guest; exits with the command's code."""
    parser = argparse.ArgumentParser(
        prog="vagrant/run",
        description="Run COMMAND on this checkout in a guest with another kernel. What it writes "
        "into $RESULTS comes back. Exits with its code, 124 if it took too long, 125 if the test "
        "bed failed.",
    )
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="default 600")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="default build/results/KERNEL of the checkout"
    )
    parser.add_argument("kernel", choices=kernels.NAMES)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("COMMAND is missing")
    return _guarded("run", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    return machine.run(
        kernels.boot(options.kernel),
        partial(checkout.write_job, command=options.command),
        options.results or checkout.ROOT / "build/results" / options.kernel,
        options.timeout,
        _write,
    )


def _write(data: bytes) -> None:
    """Straight to stdout: the guest's output is passed on as it comes."""
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]


def build(arguments: Sequence[str] | None = None) -> int:
    """`vagrant/build-box`: build what is missing and print where things are."""
    parser = argparse.ArgumentParser(
        prog="vagrant/build-box",
        description="Build what is missing of the test bed and print NAME=PATH for each part.",
    )
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="default: all, and the box")
    parser.add_argument("--no-build", action="store_true", help="only print what is there already")
    options = parser.parse_args(arguments)
    _check_names(parser, options.kernels)
    if options.no_build:
        cache.forbid_building()
    return _guarded("build-box", lambda: _build(options.kernels, complete=not options.no_build))


def _build(names: Sequence[str], *, complete: bool) -> int:
    """Print what there is after building it; `complete` if what is missing is an error."""
    for title, part in _parts(names):
        try:
            print(f"{title}={part()}", flush=True)
        except BedError:
            if complete:
                raise
    return 0


def _parts(names: Sequence[str]) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Everything the test bed consists of, with what builds it."""
    for name in names or kernels.NAMES:
        yield f"kernel-{name}", partial(kernels.kernel, name)
        if name != kernels.NOBPF:
            yield f"initrd-{name}", partial(kernels.initrd, name)
    yield "image", lambda: guest().image
    if not names:
        yield "box", lambda: box(guest())


def _check_names(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    for name in names:
        if name not in kernels.NAMES:
            parser.error(f"unknown kernel {name}; choose from {', '.join(kernels.NAMES)}")


def examine(arguments: Sequence[str] | None = None) -> int:
    """`make test-kernels`: the interception tests on every kernel."""
    parser = argparse.ArgumentParser(prog="vagrant/test-kernels")
    parser.add_argument("--all", action="store_true", help="every test: hours, emulated")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="default: all")
    options = parser.parse_args(arguments)
    _check_names(parser, options.kernels)
    names = options.kernels or kernels.NAMES
    extent = Extent.ALL if options.all else Extent.CORE
    return _guarded("test-kernels", lambda: matrix.examine(names, extent))
