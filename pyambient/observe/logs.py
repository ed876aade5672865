"""The programs' own log: structlog in ztunnel's layout, on standard error unless told otherwise.

structlog takes half of what `pyambient --help` may take to start, so it is imported with the first
line that is logged. Its own global configuration is left alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from .layout import LEVELS, Layout, layout_of, level_number, plain_line

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger, Processor

Emit = Callable[[str], None]
"""Takes a line without its newline."""


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


@dataclass
class _Settings:
    """How this process logs."""

    layout: Layout = plain_line
    level: int = LEVELS["info"]
    emit: Emit = _to_stderr
    common: Mapping[str, Any] = field(default_factory=dict)


_settings = _Settings()


def configure(
    log_format: str,
    level: str = "info",
    emit: Emit = _to_stderr,
    common: Mapping[str, Any] | None = None,
) -> None:
    """Set layout, least level and receiver of all lines; loggers made before follow.

    `common` are fields that every line begins with. UsageError for a format or level that does not
    exist.
    """
    _settings.layout = layout_of(log_format)
    _settings.level = level_number(level)
    _settings.emit = emit
    _settings.common = common or {}
    _bound.cache_clear()


def get_logger(scope: str) -> FilteringBoundLogger:
    """The logger of a scope (a room, `proxy::inbound`); fields are keyword arguments."""
    return cast("FilteringBoundLogger", _LazyLogger(scope))


class _LazyLogger:
    """Stands in for a structlog logger, which it makes when it is first used."""

    def __init__(self, scope: str) -> None:
        self._scope = scope

    def __getattr__(self, name: str) -> Any:
        return getattr(_bound(self._scope), name)

    def __repr__(self) -> str:
        return f"<Logger {self._scope}>"


def _structlog() -> ModuleType:
    """Structlog without rich, which its renderers for developers import wherever it is installed.

    That is 10 MB of every proxy's memory for renderers that nothing here uses.
    """
    absent = "rich" not in sys.modules
    if absent:
        sys.modules["rich"] = cast("ModuleType", None)
    try:
        import structlog  # noqa: PLC0415 - see the module's docstring
    finally:
        if absent:
            del sys.modules["rich"]
    return structlog


@functools.lru_cache(maxsize=256)
def _bound(scope: str) -> FilteringBoundLogger:
    structlog = _structlog()
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.format_exc_info,
        functools.partial(_render, scope),
    ]
    filtering = structlog.make_filtering_bound_logger(_settings.level)
    logger = structlog.wrap_logger(_Receiver(), processors, filtering, dict)
    return cast("FilteringBoundLogger", logger.bind())


def _render(scope: str, _logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
    level = {"warning": "warn", "critical": "error"}.get(method, method)
    message = str(event.pop("event", ""))
    return _settings.layout(level, scope, message, {**_settings.common, **event})


class _Receiver:
    """What structlog hands a rendered line to, under the name of its level."""

    def debug(self, line: str) -> None:
        _settings.emit(line)

    info = warning = error = critical = debug
