"""Supervised processes: started, watched, started again, stopped.

A child ends with its parent, even if that is killed: it asks the kernel for a signal at the
parent's death (PR_SET_PDEATHSIG), which counts the death of the *thread* that forked it. Children
are therefore started in the main thread and not by `trio.run_process`, which uses others.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

FIRST_DELAY: Final = 0.5
LAST_DELAY: Final = 15.0
# A child that lived this long starts over with the first delay.
LASTING: Final = 30.0
_PR_SET_PDEATHSIG: Final = 1


def stop_with(parent: int) -> None:
    """Have the kernel end this process (SIGTERM) when `parent`, which started it, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(0)


def module(name: str, *words: str) -> list[str]:
    """The command that runs a module by this very interpreter.

    With -P, or a file of that name in the folder where root happens to be would be imported.
    """
    return [sys.executable, "-P", "-m", name, *words]


def start(line: Sequence[str], pass_fds: Collection[int] = ()) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own.

    Ctrl-C is for the parent, which stops the children in peace.
    """
    return subprocess.Popen(
        line, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=tuple(pass_fds)
    )


class ChildFailed(Exception):
    """A child ended before its parent was ready; it has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(eq=False)
class Child:
    """One command, which `begin` starts; `patience` s after SIGTERM it is killed.

    `say` is given a line when it has ended and is about to be started again.
    """

    name: str
    begin: Callable[[], subprocess.Popen[bytes]]
    patience: float
    ready: trio.Event
    say: Callable[[str], None]
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    async def keep_running(self) -> None:
        """Run the command again whenever it ends; ChildFailed if it ends before `ready`.

        So does an OSError of a start; after `ready` that is one more end: memory or descriptors
        that are short for one child are no reason to end the others.
        """
        delay = FIRST_DELAY
        while True:
            began = trio.current_time()
            how = await self._run_to_its_end()
            if trio.current_time() - began > LASTING:
                delay = FIRST_DELAY
            self.say(f"the {self.name} {how}; next start in {delay:g} s")
            await trio.sleep(delay)
            delay = min(delay * 2, LAST_DELAY)

    async def _run_to_its_end(self) -> str:
        """How it ended, in words."""
        try:
            code = await self._run()
        except OSError as error:
            if not self.ready.is_set():
                raise
            return f"could not be started: {error.strerror}"
        if not self.ready.is_set():
            raise ChildFailed(code)
        return _ending(code)

    async def _run(self) -> int:
        """Run the command once; its return code. Cancelled, it is told to stop and waited for."""
        process = self.process = self.begin()  # in this very thread, see above
        try:
            await _ended(process)
        finally:
            with trio.CancelScope(shield=True):
                await self._stop(process)
        return process.wait()

    async def _stop(self, process: subprocess.Popen[bytes]) -> None:
        with trio.move_on_after(self.patience):
            process.terminate()
            await _ended(process)
        process.kill()
        await _ended(process)

    @property
    def pid(self) -> int | None:
        return None if self.process is None else self.process.pid

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def __repr__(self) -> str:
        return f"<Child {self.name} {self.process!r}>"


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process has ended, and reap it."""
    if process.poll() is not None:
        return
    handle = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(handle)
    finally:
        os.close(handle)
    process.wait()


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended (exit code {code})"
