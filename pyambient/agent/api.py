"""The agent's own socket: JSON lines between the command line and the agent.

A request is `{"command": NAME, ...}`, its answer `{"result": ...}` or
`{"error": {"what": ..., "then": ..., "exit_code": N}}`; both are one line. A connection may carry
several, one after the other. The socket is root's alone, like all that enrolling takes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import trio

from pyambient import __version__
from pyambient.errors import PyambientError, UsageError
from pyambient.model.explained import Outcome
from pyambient.observe.logs import get_logger

from .config import MAX_DRAIN_TIMEOUT
from .enrolled import EnrolRequest
from .enrolment import Enrolments
from .explain import Inquiry, completed, explain
from .proxies import Proxies
from .reconcile import Rounds
from .status import describe
from .unix_socket import serve
from .verify import verify

# Two lists of 10,000 CIDRs for each direction.
REQUEST_LIMIT: Final = 2 << 20
MAX_CLIENTS: Final = 64
_IDLE_TIMEOUT: Final = 30.0
_log = get_logger("api")
_Command = Callable[[Mapping[str, Any]], Awaitable[Any]]


class Api:
    """The commands, and the socket that takes them."""

    def __init__(self, enrolments: Enrolments, proxies: Proxies, rounds: Rounds) -> None:
        self._enrolments = enrolments
        self._proxies = proxies
        self._rounds = rounds
        self._commands: dict[str, _Command] = {
            "enroll": self._enroll,
            "set": self._set,
            "unenroll": self._unenroll,
            "status": self._status,
            "verify": self._verify,
            "explain": self._explain,
        }

    async def serve(
        self, path: Path, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Answer at `path` for ever; started when it listens."""
        kind = socket.SOCK_STREAM
        await serve(path, kind, MAX_CLIENTS, self._serve_client, task_status=task_status)

    async def _serve_client(self, connection: trio.socket.SocketType) -> None:
        async with trio.SocketStream(connection) as stream:
            lines = _Lines(stream)
            try:
                while (line := await lines.next()) is not None:
                    answer = await self._answer(line)
                    await stream.send_all(json.dumps(answer).encode() + b"\n")
            except (trio.BrokenResourceError, trio.TooSlowError):
                _log.debug("a client left")

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            return {"result": await self._run(line)}
        except PyambientError as error:
            return {"error": _error_fields(error)}
        except OSError as error:
            return {"error": _error_fields(PyambientError(str(error)))}
        except Exception as error:  # noqa: BLE001 - a bug met by one request spares the others
            _log.error("internal error, a request is given up", exc_info=error)
            return {"error": _error_fields(PyambientError("internal error", "see the agent's log"))}

    async def _run(self, line: bytes) -> Any:
        try:
            request = json.loads(line)
            command = self._commands[request["command"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError("the agent does not know this request") from None
        return await command(request)

    async def _enroll(self, request: Mapping[str, Any]) -> Any:
        fields = {field.name: field.default for field in dataclasses.fields(EnrolRequest)}
        del fields["choices"]
        texts = {name: _text(request, name, default) for name, default in fields.items()}
        choices = _choices(request)
        record = await self._enrolments.enrol(EnrolRequest(**texts, choices=choices))
        enrolled = self._enrolments.lookup(record.netns.path)
        return {**describe(record), "existing": await self._enrolments.upkeep.existing(enrolled)}

    async def _set(self, request: Mapping[str, Any]) -> Any:
        enrolled = self._enrolments.lookup(_text(request, "netns"))
        return describe(await self._enrolments.change(enrolled, _choices(request)))

    async def _unenroll(self, request: Mapping[str, Any]) -> Any:
        enrolled = self._enrolments.lookup(_text(request, "netns"))
        timeout = request.get("drain_timeout")
        if timeout is not None and not _is_span(timeout):
            raise UsageError(f"drain_timeout is a number of seconds up to {MAX_DRAIN_TIMEOUT:g}")
        left = await self._enrolments.unenrol(enrolled, timeout)
        return {"pod": describe(enrolled.record), "connections_cut": left}

    async def _status(self, _: Mapping[str, Any]) -> Any:
        pods = self._enrolments.all()
        served: dict[str, dict[str, Any] | None] = {}

        async def ask(uid: str) -> None:
            served[uid] = await self._proxies.status(uid)

        async with trio.open_nursery() as nursery:
            for pod in pods:
                nursery.start_soon(ask, pod.uid)
        return {
            "agent": {"pid": os.getpid(), "version": __version__},
            "reconcile": self._rounds.status(),
            "proxies": self._proxies.pids,
            "pods": [
                {
                    **describe(pod.record),
                    "repairs": dict(pod.repairs),
                    "existing": await self._enrolments.upkeep.existing(pod),
                    "guard": await self._enrolments.upkeep.leaks(pod),
                    "proxy": served[pod.uid],
                }
                for pod in pods
            ],
        }

    async def _verify(self, request: Mapping[str, Any]) -> Any:
        enrolled = self._enrolments.lookup(_text(request, "netns"))
        # A handle of its own: the pod may be freed, and its handle closed, meanwhile.
        with enrolled.netns.duplicate() as netns:
            pids = await self._proxies.serving(enrolled.uid)
            checks = await trio.to_thread.run_sync(verify, enrolled.record, netns, pids)
        return [dataclasses.asdict(check) for check in checks]

    async def _explain(self, request: Mapping[str, Any]) -> Any:
        enrolled = self._enrolments.lookup(_text(request, "netns"))
        texts = (_text(request, name, "") for name in ("to", "source", "device"))
        inquiry = Inquiry.parse(*texts)
        with enrolled.netns.duplicate() as netns:
            record = enrolled.record
            own = await trio.to_thread.run_sync(explain, record, netns, inquiry)
        proxy = None
        if own.outcome is Outcome.CAPTURED:
            proxy = await self._proxies.explain(inquiry.for_proxy(enrolled.uid))
        return completed(own, proxy).to_json()


class _Lines:
    """Lines of a stream, each of a bounded size."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def next(self) -> bytes | None:
        """The next line without its end; None at the end of the stream."""
        with trio.fail_after(_IDLE_TIMEOUT):
            while (end := self._buffer.find(b"\n")) < 0:
                if len(self._buffer) > REQUEST_LIMIT:
                    return None
                received = await self._stream.receive_some(REQUEST_LIMIT)
                if not received:
                    return None
                self._buffer += received
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


def _text(request: Mapping[str, Any], name: str, default: object = None) -> str:
    """A field that has to be one line of text, as a name or a path is."""
    value = request.get(name, default)
    if not isinstance(value, str) or not value.isprintable():
        raise UsageError(f"the request needs {name}, a line of text")
    return value


def _choices(request: Mapping[str, Any]) -> dict[str, Any]:
    options = request.get("options", {})
    if not isinstance(options, dict):
        raise UsageError("options are a JSON object")
    return options


def _is_span(value: object) -> bool:
    """Whether it is a number of seconds to wait; NaN is not."""
    return isinstance(value, int | float) and 0 <= value <= MAX_DRAIN_TIMEOUT


def _error_fields(error: PyambientError) -> dict[str, Any]:
    return {"what": error.what, "then": error.then, "exit_code": error.exit_code}
