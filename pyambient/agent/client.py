"""Asking the agent, from plain synchronous code: what the command line is made of."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Final

from pyambient.errors import PyambientError

from .config import RunDir

ANSWER_LIMIT: Final = 64 << 20
DEFAULT_TIMEOUT: Final = 60.0


class AgentAbsent(PyambientError):
    """Nobody answers at the agent's socket."""


def ask(
    run_dir: RunDir, command: str, patience: float = DEFAULT_TIMEOUT, /, **arguments: Any
) -> Any:
    """The agent's result of a command; the PyambientError it answers with, AgentAbsent if none.

    `patience` bounds the whole exchange, in seconds.
    """
    path = run_dir.agent_socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(patience)
        if not _connected(connection, path):
            raise AgentAbsent(
                f"the agent is not running (nobody listens at {path})",
                "start it with 'pyambient up', or give its --run-dir",
            )
        try:
            connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as answers:
                line = answers.readline(ANSWER_LIMIT)
        except (ConnectionResetError, BrokenPipeError):
            line = b""
        except TimeoutError:
            raise PyambientError(
                f"the agent did not answer within {patience:.0f} s", "see what its log says"
            ) from None
    if not line:
        raise _hung_up(path, patience)
    return _result(line)


def _connected(connection: socket.socket, path: Path) -> bool:
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def _hung_up(path: Path, patience: float) -> PyambientError:
    """An agent that lives hangs up on too many clients, and on a request without end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(patience)
        if _connected(connection, path):
            return PyambientError(
                "the agent hung up on the request",
                "it has too many clients, or the request is too long; see what its log says",
            )
    return AgentAbsent(
        "the agent ended before it answered", "see what its log says, and start it again"
    )


def _result(line: bytes) -> Any:
    answer = json.loads(line)
    if "error" in answer:
        fields = answer["error"]
        error = PyambientError(fields["what"], fields["then"])
        error.exit_code = fields["exit_code"]
        raise error
    return answer["result"]
