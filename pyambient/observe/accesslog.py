"""The access log: ztunnel's lines about connections, field for field.

A connection is one line when it ends (level info, or error with the reason), and one when it
opens at level debug. The line is built here with plain string operations, for it is written on
the data path; the order of fields is ztunnel's `src/proxy/metrics.rs`. Absent fields are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pyambient.model.address import SocketAddress
from pyambient.model.spiffe import SpiffeId
from pyambient.model.workload import Workload

from .layout import (
    LEVELS,
    Layout,
    bare,
    json_line,
    json_string,
    layout_of,
    level_number,
    plain_line,
    quote,
    timestamp,
)

Direction = Literal["inbound", "outbound"]
# Few workloads are at the ends of most connections.
_ENDS_MAX = 4096


@dataclass(slots=True, kw_only=True)
class ConnectionRecord:
    """What is logged of one connection.

    Identities are set only where mutual TLS proved them. `destination` is the address connected
    to, with port 15008 for HBONE; `hbone_authority` is then the CONNECT request's. Bytes are
    counted from the client's side on outbound, from the server's on inbound; `started` is a
    `time.monotonic()`.
    """

    direction: Direction
    source: SocketAddress
    source_workload: Workload | None = None
    source_identity: SpiffeId | None = None
    destination: SocketAddress
    hbone_authority: str | None = None
    destination_service: str | None = None
    destination_workload: Workload | None = None
    destination_identity: SpiffeId | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    started: float = field(default_factory=time.monotonic)
    error: str | None = None


class _Style(Protocol):
    """How one format writes a field, and a line of fields."""

    def text(self, name: str, value: str) -> str: ...
    def address(self, name: str, value: str) -> str: ...
    def number(self, name: str, value: int) -> str: ...
    def line(self, level: str, message: str, fields: list[str]) -> str: ...


class _Plain:
    def text(self, name: str, value: str) -> str:
        return f"{name}={quote(value)}"

    def address(self, name: str, value: str) -> str:
        return f"{name}={bare(value)}"

    def number(self, name: str, value: int) -> str:
        return f"{name}={value}"

    def line(self, level: str, message: str, fields: list[str]) -> str:
        return f"{timestamp()}\t{level}\taccess\t{message}\t{' '.join(fields)}"


class _Json:
    def text(self, name: str, value: str) -> str:
        return f'"{name}":{json_string(value)}'

    def address(self, name: str, value: str) -> str:
        return self.text(name, value)

    def number(self, name: str, value: int) -> str:
        return f'"{name}":{value}'

    def line(self, level: str, message: str, fields: list[str]) -> str:
        head = f'"level":"{level}","time":"{timestamp()}","scope":"access","message":"{message}"'
        return f"{{{head},{','.join(fields)}}}"


_STYLES: Mapping[Layout, _Style] = {plain_line: _Plain(), json_line: _Json()}


class AccessLog:
    """Hands lines at or above `level` to `emit`, without their newline."""

    def __init__(
        self,
        log_format: str,
        emit: Callable[[str], None],
        level: str = "info",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._style = _STYLES[layout_of(log_format)]
        self._emit = emit
        self._clock = clock
        self._level = level_number(level)
        self._ends: dict[tuple[str, int, SpiffeId | None], tuple[Workload | None, list[str]]] = {}

    def opened(self, record: ConnectionRecord) -> None:
        if self._level <= LEVELS["debug"]:
            line = self._style.line("debug", "connection opened", self._peers(record))
            self._emit(line)

    def complete(self, record: ConnectionRecord) -> None:
        """The connection's one line, when both halves of it are closed or it failed."""
        level = "info" if record.error is None else "error"
        if self._level > LEVELS[level]:
            return
        style = self._style
        milliseconds = int((self._clock() - record.started) * 1000)
        fields = self._peers(record)
        fields.append(style.number("bytes_sent", record.bytes_sent))
        fields.append(style.number("bytes_recv", record.bytes_received))
        fields.append(style.text("duration", f"{milliseconds}ms"))
        if record.error is not None:
            fields.append(style.text("error", record.error))
        self._emit(style.line(level, "connection complete", fields))

    def failed(
        self, source: SocketAddress, destination: SocketAddress, direction: Direction, error: str
    ) -> None:
        """A connection refused before anything is known about it but its addresses."""
        if self._level > LEVELS["warn"]:
            return
        style = self._style
        fields = [
            style.address("src.addr", str(source)),
            style.address("dst.addr", str(destination)),
            style.text("direction", direction),
            style.text("error", error),
        ]
        self._emit(style.line("warn", "connection failed", fields))

    def _peers(self, record: ConnectionRecord) -> list[str]:
        """The fields that are known when a connection opens."""
        style = self._style
        fields = [style.address("src.addr", str(record.source))]
        self._end(fields, "src", record.source_workload, record.source_identity)
        fields.append(style.address("dst.addr", str(record.destination)))
        if record.hbone_authority:
            fields.append(style.address("dst.hbone_addr", record.hbone_authority))
        if record.destination_service:
            fields.append(style.text("dst.service", record.destination_service))
        self._end(fields, "dst", record.destination_workload, record.destination_identity)
        fields.append(style.text("direction", record.direction))
        return fields

    def _end(
        self, fields: list[str], end: str, workload: Workload | None, identity: SpiffeId | None
    ) -> None:
        """Add what is known of one end, `src` or `dst`; the same for all its connections."""
        key = (end, id(workload), identity)
        known = self._ends.get(key)
        if known is None or known[0] is not workload:
            if len(self._ends) >= _ENDS_MAX:
                self._ends.clear()
            known = self._ends[key] = (workload, self._describe(end, workload, identity))
        fields += known[1]

    def _describe(
        self, end: str, workload: Workload | None, identity: SpiffeId | None
    ) -> list[str]:
        fields: list[str] = []
        text = self._style.text
        if workload is not None:
            fields.append(text(f"{end}.workload", workload.name))
            fields.append(text(f"{end}.namespace", workload.namespace))
        if identity is not None:
            fields.append(text(f"{end}.identity", str(identity)))
        if workload is not None and workload.cluster_id:
            fields.append(text(f"{end}.cluster", workload.cluster_id))
        return fields

    def __repr__(self) -> str:
        return f"<AccessLog {type(self._style).__name__.strip('_').lower()}, level {self._level}>"
