"""Asking the agent, from plain synchronous code: what the command line is made of."""

from __future__ import annotations

import json
import socket
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
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            raise AgentAbsent(
                f"the agent is not running (nobody listens at {path})",
                "start it with 'pyambient up', or give its --run-dir",
            ) from None
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
    return _result(line)


def _result(line: bytes) -> Any:
    if not line:
        raise AgentAbsent(
            "the agent ended before it answered", "see what its log says, and start it again"
        )
    answer = json.loads(line)
    if "error" in answer:
        fields = answer["error"]
        error = PyambientError(fields["what"], fields["then"])
        error.exit_code = fields["exit_code"]
        raise error
    return answer["result"]
