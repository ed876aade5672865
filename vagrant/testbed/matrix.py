"""`make test-kernels`: every kernel examined, as many guests at a time as there are CPUs."""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from . import kernels
from .checkout import ROOT
from .report import Cell, Examined, columns, document, table
from .selection import Extent

RESULTS = ROOT / "build/kernels"
_DOCUMENT = ROOT / "docs/kernels.md"
# Above what the steps of one examination may take together.
_SECONDS = 5 * 3600
_EXAMINATION = ("python", "-m", "vagrant.testbed.examination")


@dataclass
class _Guest:
    """A kernel under examination."""

    kernel: str
    process: subprocess.Popen[bytes]
    tail: bytes = b""

    @property
    def port(self) -> IO[bytes]:
        if self.process.stdout is None:
            raise ValueError("the guest was started without a pipe")
        return self.process.stdout

    def tell(self, data: bytes) -> None:
        """Print complete lines, each with the kernel's name in front."""
        *lines, self.tail = (self.tail + data).split(b"\n")
        for line in lines:
            print(f"{self.kernel:>5}  {line.decode(errors='replace').rstrip()}", flush=True)


def examine(names: Sequence[str], extent: Extent) -> int:
    """Examine these kernels; 0 if every cell that should work does."""
    kernels.build(names)
    for name in names:
        shutil.rmtree(RESULTS / name, ignore_errors=True)
    _run_all(names, (*_EXAMINATION, extent))
    examined = [Examined.read(name, RESULTS / name) for name in names]
    cells = {one.kernel: _cells(one, columns(examined)) for one in examined}
    print(f"\n{table(cells)}")
    _write_page()
    return int(any(cell.works is False for mine in cells.values() for cell in mine.values()))


def _write_page() -> None:
    """Write docs/kernels.md, if there are results of every kernel by now."""
    examined = [Examined.read(name, RESULTS / name) for name in kernels.NAMES]
    if not all(one.outcomes for one in examined):
        return
    cells = {one.kernel: _cells(one, columns(examined)) for one in examined}
    _DOCUMENT.write_text(document(examined, cells))
    print(f"\n{_DOCUMENT.relative_to(ROOT)} is written")


def _cells(one: Examined, names: Sequence[str]) -> Mapping[str, Cell]:
    return {
        name: one.cell(name, expected=(one.kernel, name) not in kernels.NOT_EXPECTED)
        for name in names
    }


def _run_all(names: Sequence[str], command: Sequence[str]) -> None:
    waiting = list(names)
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or selector.get_map():
                while waiting and len(selector.get_map()) < (os.cpu_count() or 1):
                    guest = _start(waiting.pop(0), command)
                    selector.register(guest.port, selectors.EVENT_READ, guest)
                for key, _ in selector.select():
                    if not _read(key.data):
                        selector.unregister(key.fileobj)
        finally:
            for key in list(selector.get_map().values()):
                key.data.process.terminate()
                key.data.process.wait()


def _start(kernel: str, command: Sequence[str]) -> _Guest:
    options = [f"--timeout={_SECONDS}", f"--results={RESULTS / kernel}"]
    run = [sys.executable, str(ROOT / "vagrant/run"), *options, kernel, *command]
    return _Guest(kernel, subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))


def _read(guest: _Guest) -> bool:
    """Pass on what the guest said; False when it is done."""
    data = os.read(guest.port.fileno(), 1 << 16)
    guest.tell(data)
    if not data:
        guest.process.communicate()
    return bool(data)
