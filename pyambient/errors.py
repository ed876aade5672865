"""Errors that reach a user: one line that says what happened and what to do next.

Every error a user can meet is a `PyambientError`; its subclasses carry the exit code of the
command line (0 ok, 1 failed, 2 usage, 3 unsupported by this kernel, 4 needs root). Errors of a
protocol live with their protocol and never leave the connection they belong to.
"""

from __future__ import annotations


class PyambientError(Exception):
    """Something failed that a user can act on.

    `what` says what happened, `then` what to do next; both are phrases without a full stop.
    """

    exit_code = 1

    def __init__(self, what: str, then: str = "") -> None:
        super().__init__(what, then)
        self.what = what
        self.then = then

    def __str__(self) -> str:
        return f"{self.what}; {self.then}" if self.then else self.what


class UsageError(PyambientError):
    """The request itself is wrong: a name, an option or a file that cannot be used."""

    exit_code = 2


class UnsupportedFeature(PyambientError):
    """The kernel lacks `name`; `minimum_kernel` is the first release that has it."""

    exit_code = 3

    def __init__(self, name: str, minimum_kernel: str, then: str = "") -> None:
        super().__init__(f"this kernel has no {name} (Linux {minimum_kernel} and later do)", then)
        self.name = name
        self.minimum_kernel = minimum_kernel


class NeedsRoot(PyambientError):
    """The command needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN and CAP_BPF)."""

    exit_code = 4

    def __init__(self, command: str) -> None:
        super().__init__(f"{command} needs root", "run it with sudo")


def root_cause(error: BaseException) -> BaseException:
    """What a task failed with, without the groups that trio's nurseries put around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def told(error: BaseException) -> tuple[str, int]:
    """What a program says of the failure that ends it, in one line, and its exit code."""
    error = root_cause(error)
    match error:
        case PyambientError():
            return str(error), error.exit_code
        case KeyboardInterrupt():
            return "interrupted", 130
    text = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {text}; --debug before the command shows where", 1
