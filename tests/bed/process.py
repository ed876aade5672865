"""Functions that run in a process of their own, in another place and as another user.

General theory of operation
---------------------------
A test forks: the child moves where it belongs (cgroup first, before it makes any socket; then the
network namespace; then the user), calls a function of the test, and sends back what it returned
or raised. A fork, unlike a subprocess, needs no importable module and no readable interpreter
path for the unprivileged user: closures over the test's own variables simply work.

The child keeps only its own end of the message pipe. Every other inherited descriptor is replaced
by /dev/null, not closed: a copy of another child's pipe would hide that child's end of file, and
a closed number would be reused and then closed again by the object that thinks it owns it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn, Self

from .patience import patience
from .privileges import die_with_parent

_MESSAGE, _RESULT, _ERROR = "message", "result", "error"


class ChildDied(AssertionError):
    """A child ended without saying what its function returned."""


def is_gone(pid: int) -> bool:
    """Whether a process has ended with all its threads, and so its sockets are closed.

    /proc calls it a zombie as soon as its first thread has ended.
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 0)[0])
    finally:
        os.close(handle)


class Channel:
    """The child's end: messages to and from the test."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, message: object) -> None:
        self._connection.send((_MESSAGE, message))

    def receive(self) -> Any:
        """The next message of the test; EOFError when the test is gone."""
        return self._connection.recv()

    def poll(self, timeout: float = 0) -> bool:
        return self._connection.poll(timeout)

    def fileno(self) -> int:
        return self._connection.fileno()


class Child:
    """A process of the test bed; `wait`, `kill` or leave it to the bed's teardown."""

    def __init__(self, pid: int, connection: Connection, name: str) -> None:
        self.pid = pid
        self.name = name
        self._connection = connection
        self._inbox: deque[Any] = deque()
        self._status: int | None = None

    def send(self, message: object) -> None:
        self._connection.send(message)

    def receive(self, timeout: float = 20) -> Any:
        """The child's next message; its exception if it failed, TimeoutError if it is silent."""
        if self._inbox:
            return self._inbox.popleft()
        kind, value = self._read(patience(timeout))
        if kind == _MESSAGE:
            return value
        self.kill()
        if kind == _ERROR:
            raise value
        raise ChildDied(f"{self!r} returned {value!r} where a message was expected")

    def ask(self, question: object, timeout: float = 20) -> Any:
        """Send and receive: the form of all commands to the bed's apps."""
        self.send(question)
        return self.receive(timeout)

    def wait(self, timeout: float = 20) -> Any:
        """What the function returned; raises what it raised. Unread messages stay readable."""
        deadline = time.monotonic() + patience(timeout)
        while True:
            kind, value = self._read(max(0.0, deadline - time.monotonic()))
            if kind == _MESSAGE:
                self._inbox.append(value)
                continue
            self.kill()
            if kind == _ERROR:
                raise value
            return value

    def _read(self, timeout: float) -> tuple[str, Any]:
        if not self._connection.poll(timeout):
            self._abort()
            raise TimeoutError(f"{self!r} said nothing for {timeout:.0f} s and was ended")
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self.kill()
            raise ChildDied(f"{self!r} ended with wait status {self._status}") from None
        if kind == _ERROR:
            value, text = value
            value.add_note(f"raised in {self!r}:\n{text}")
        return kind, value

    def _abort(self) -> None:
        """End a child that hangs so that it prints where."""
        if self.alive:
            os.kill(self.pid, signal.SIGABRT)
            deadline = time.monotonic() + 1
            while self.alive and time.monotonic() < deadline:
                time.sleep(0.01)
        self.kill()

    @property
    def alive(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = status
        return self._status is None

    def kill(self) -> None:
        """End the process now; killing one that ended already is no error."""
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
            self._status = os.waitpid(self.pid, 0)[1]
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def __repr__(self) -> str:
        return f"<Child {self.name} pid {self.pid}>"


def fork(
    name: str,
    settle: Callable[[], None],
    body: Callable[[Channel], Any],
    keep: Collection[int] = (),
) -> Child:
    """Run `settle`, then `body(channel)` in a child; `keep` are descriptors it may use."""
    ours, theirs = Pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Python 3.12 warns about threads; the only ones here are watchdogs that take no locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _live(theirs, settle, body, keep)
    theirs.close()
    return Child(pid, ours, name)


def _live(
    connection: Connection,
    settle: Callable[[], None],
    body: Callable[[Channel], Any],
    keep: Collection[int],
) -> NoReturn:
    status = 1
    try:
        _disinherit({0, 1, 2, connection.fileno(), *keep})
        faulthandler.enable(file=2, all_threads=True)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        answer = _outcome(connection, settle, body)
        _answer(connection, answer)
        status = 0
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _outcome(
    connection: Connection, settle: Callable[[], None], body: Callable[[Channel], Any]
) -> tuple[str, Any]:
    try:
        settle()
        die_with_parent()
        return _RESULT, body(Channel(connection))
    except BaseException as error:  # noqa: BLE001 - it is raised again in the parent
        return _ERROR, (_portable(error), traceback.format_exc())


def _portable(error: BaseException) -> BaseException:
    """The error itself, or its text where its class cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever an __init__ raises on arguments it did not expect
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _answer(connection: Connection, answer: tuple[str, Any]) -> None:
    try:
        connection.send(answer)
    except BrokenPipeError:
        return  # the test killed us or is gone: nobody is left to tell
    except Exception as error:  # noqa: BLE001 - whatever pickle says about this value
        text = traceback.format_exc()
        connection.send((_ERROR, (TypeError(f"cannot send {answer!r}: {error}"), text)))


def _disinherit(keep: Collection[int]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if number not in keep and number != null:
            with contextlib.suppress(OSError):
                os.fstat(number)
                os.dup2(null, number, inheritable=False)
