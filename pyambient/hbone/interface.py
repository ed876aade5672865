"""What a connection expects of the code around it."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol

from .headers import Headers

if TYPE_CHECKING:
    from .request import ConnectRequest
    from .streams import Stream


class Role(enum.Enum):
    """Which end of the connection we are: clients open streams, servers answer them."""

    CLIENT = "client"
    SERVER = "server"


class StreamSink(Protocol):
    """What receives one stream's life.

    The calls come from inside `Connection.receive` (`writable` also from `Connection.sent`), and
    may call the connection back, except for `receive` itself. After `reset` nothing follows.
    """

    def answered(self, status: int, headers: Headers) -> None:
        """Client: the final answer arrived, 200 or not. Never 1xx."""

    def data(self, view: memoryview) -> None:
        """Payload, valid during the call only; `credit` it once it is consumed."""

    def ended(self) -> None:
        """The peer sent END_STREAM: its direction is complete."""

    def reset(self, code: int) -> None:
        """The stream is gone: by the peer, by its mistake, or with the connection.

        What was received and not yet credited is credited to the connection already.
        """

    def writable(self) -> None:
        """There may be room again, after `reserve` had returned an empty view."""


class Owner(Protocol):
    """Who made the connection. The calls come from inside the connection's own methods."""

    def requested(self, stream: Stream, request: ConnectRequest) -> None:
        """Server: a CONNECT. Set `stream.sink`, then now or later `accept` or `refuse` it."""

    def refused(self, stream_id: int, status: int, why: str) -> None:
        """Server: the connection itself answered a request that is no CONNECT; for the log."""

    def settled(self) -> None:
        """The peer's first SETTINGS arrived; a client may open streams from now on."""

    def drained(self) -> None:
        """GOAWAY was sent or received, no stream is left, and all output was taken."""

    def goaway(self, code: int) -> None:
        """The peer sent GOAWAY: open nothing more here. Streams it will serve go on."""
