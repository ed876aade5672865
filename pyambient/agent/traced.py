"""An event as `trace` shows it: with the pod's name and the time of day."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from pyambient.intercept.trace_event import Event
from pyambient.model.address import SocketAddress
from pyambient.observe.layout import bare, timestamp

_HANDED_OVER: Final = frozenset(("captured", "redirected", "steered"))
_REFUSALS: Final[Mapping[str, str]] = {
    "no listener": "nobody listens",
    "no route": "its device has no route for captured sockets",
    "no room": "there is no room to note it",
    "forged": "it comes as the proxy's, and is not",
    "reserved port": "the port is the proxy's",
    "unreadable": "it may be a query, and cannot be read",
}
_OF_GUARDS: Final[Mapping[str, str]] = {
    "captured": "of a captured connection",
    "socket": "of a socket that was never captured",
    "raw": "of a raw or packet socket",
    "forwarded": "forwarded, or of no socket",
    "unreadable": "it cannot be read",
    "unsigned": "past the pod's guard",
    "dns": "a query past the proxy",
}


@dataclass(frozen=True, slots=True)
class Traced:
    """One event; `netns` and `pod` are as `status` names them."""

    event: Event
    moment: datetime
    netns: str
    pod: str

    def to_json(self) -> dict[str, Any]:
        event = self.event
        return {
            "time": timestamp(self.moment),
            "netns": self.netns,
            "pod": self.pod,
            "decision": event.decision,
            "reason": event.reason or None,
            "direction": event.direction,
            "protocol": event.protocol,
            "source": str(event.source) if event.source else None,
            "destination": str(event.destination),
            "listener": event.listener or None,
            "hook": event.hook,
            "pid": event.pid or None,
            "process": event.process or None,
        }

    def __str__(self) -> str:
        event = self.event
        ends = f"{_from(event.source)}> {event.destination}"
        what = f"{event.decision} {event.direction} {event.protocol} {ends}{_why(event)}"
        return f"{timestamp(self.moment)} {self.pod} {what} ({_by(event)})"


def _from(source: SocketAddress | None) -> str:
    """A socket may have an address before it has a port."""
    if source is None:
        return ""
    return f"{source} " if source.port else f"{source.ip} "


def _why(event: Event) -> str:
    if event.decision in _HANDED_OVER:
        return f", to {event.listener}"
    if not event.reason:
        return ""
    words = _REFUSALS if event.decision == "refused" else _OF_GUARDS
    missing = f" on {event.listener}" if event.listener else ""
    return f": {words.get(event.reason, event.reason)}{missing}"


def _by(event: Event) -> str:
    """A process names itself: it gets no control character into the terminal."""
    return f"{event.hook}, {bare(event.process)} {event.pid}" if event.pid else event.hook
