"""An end of a connection as the model test drives it: ours, or hyper-h2's, by the same calls.

An end says what it heard (`Heard`, by stream) and keeps what it has sent. Nothing moves before
`take` and `give`. Calls about a stream that the end cannot make are harmless or not offered:
`sending`, `endable`, `answerable` and `owed` list what is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import h2.config
import h2.connection
import h2.events
from h2.settings import SettingCodes

from pyambient.hbone import Connection, ConnectRequest, Headers, OutputPool, Role, Stream

from .helpers import CONNECT, REQUEST, give, send


@dataclass
class Heard:
    """What one end knows of a stream."""

    received: bytearray = field(default_factory=bytearray)
    sent: bytearray = field(default_factory=bytearray)
    uncredited: int = 0
    status: int | None = None
    ended: bool = False
    end_sent: bool = False
    resets: int = 0

    @property
    def whole(self) -> bool:
        """Nobody has given the stream up, as far as this end knows."""
        return not self.resets


class End(Protocol):
    """One end; see the top of this file."""

    heard: dict[int, Heard]

    def can_open(self) -> bool: ...
    def open(self) -> int: ...
    def answerable(self) -> list[int]: ...
    def answer(self, stream_id: int, status: int) -> None: ...
    def sending(self) -> list[int]: ...
    def endable(self) -> list[int]: ...
    def send(self, stream_id: int, payload: bytes) -> int: ...
    def owed(self) -> list[int]: ...
    def credit(self, stream_id: int, count: int) -> None: ...
    def end(self, stream_id: int) -> None: ...
    def resettable(self) -> list[int]: ...
    def reset(self, stream_id: int, code: int) -> None: ...
    def ping(self) -> None: ...
    def take(self, most: int) -> bytes: ...
    def give(self, raw: bytes) -> None: ...
    def windows(self, stream_id: int) -> tuple[int, int] | None: ...


class _Books:
    """What either end has heard, and what of it the peer has not been credited for."""

    def __init__(self) -> None:
        self.heard: dict[int, Heard] = {}

    def owed(self) -> list[int]:
        return [stream_id for stream_id, heard in self.heard.items() if heard.uncredited]

    def taken(self, stream_id: int, count: int) -> int:
        """How much of `count` there is to credit; it is not owed any more."""
        heard = self.heard[stream_id]
        count = min(count, heard.uncredited)
        heard.uncredited -= count
        return count

    def unanswered(self) -> list[int]:
        return [i for i, heard in self.heard.items() if heard.status is None and heard.whole]


class Ours(_Books):
    """A `Connection`, its owner and the sinks of its streams."""

    def __init__(self, role: Role) -> None:
        super().__init__()
        self.streams: dict[int, Stream] = {}
        self.happened: list[str] = []
        self.connection = Connection(role, self, OutputPool())
        self.connection.start()

    # hbone.Owner

    def requested(self, stream: Stream, request: ConnectRequest) -> None:
        assert request == REQUEST
        heard = self.heard[stream.id] = Heard()
        self.streams[stream.id] = stream
        stream.sink = _Sink(heard)

    def refused(self, *_: object) -> None:
        raise AssertionError("nobody here asks for anything but CONNECT")

    def settled(self) -> None:
        self.happened.append("settled")

    def goaway(self, code: int) -> None:
        self.happened.append(f"goaway {code}")

    def drained(self) -> None:
        self.happened.append("drained")

    # End

    def can_open(self) -> bool:
        return self.connection.role is Role.CLIENT and self.connection.can_open()

    def open(self) -> int:
        heard = Heard()
        stream = self.connection.open(REQUEST, _Sink(heard))
        self.heard[stream.id], self.streams[stream.id] = heard, stream
        return stream.id

    def answerable(self) -> list[int]:
        return [] if self.connection.role is Role.CLIENT else self.unanswered()

    def answer(self, stream_id: int, status: int) -> None:
        stream, heard = self.streams[stream_id], self.heard[stream_id]
        heard.status = status
        if status == 200:
            self.connection.accept(stream)
        else:
            self.connection.refuse(stream, status)
            heard.end_sent, heard.resets = True, 1

    def sending(self) -> list[int]:
        return [i for i, h in self.heard.items() if h.status == 200 and not h.end_sent and h.whole]

    def endable(self) -> list[int]:
        """Not below a window of 0, though RFC 9113 section 6.9 allows an empty DATA frame there.

        hyper-h2 takes one for an overrun of the window that its own SETTINGS have made negative.
        """
        return [i for i in self.sending() if self.streams[i].send_window >= 0]

    def send(self, stream_id: int, payload: bytes) -> int:
        done = send(self.connection, self.streams[stream_id], payload)
        self.heard[stream_id].sent += payload[:done]
        return done

    def credit(self, stream_id: int, count: int) -> None:
        self.connection.credit(self.streams[stream_id], self.taken(stream_id, count))

    def end(self, stream_id: int) -> None:
        self.heard[stream_id].end_sent = True
        self.connection.end(self.streams[stream_id])

    def resettable(self) -> list[int]:
        return list(self.heard)

    def reset(self, stream_id: int, code: int) -> None:
        stream, heard = self.streams[stream_id], self.heard[stream_id]
        if not stream.closed:
            heard.resets += 1
        heard.uncredited = 0
        self.connection.reset(stream, code)

    def ping(self) -> None:
        self.connection.ping(b"from us.")

    def take(self, most: int) -> bytes:
        raw = bytes(self.connection.pending[:most])
        if raw:
            self.connection.sent(len(raw))
        return raw

    def give(self, raw: bytes) -> None:
        give(self.connection, raw)

    def windows(self, stream_id: int) -> tuple[int, int] | None:
        """How much we may send, and how much the peer may."""
        stream, connection = self.streams[stream_id], self.connection
        if stream.closed:
            return None
        return (
            min(stream.send_window, connection._send_window),
            min(stream.receive_window, connection._receive_window),
        )

    def check_books(self) -> None:
        """Every byte of the connection's window is somewhere."""
        connection = self.connection
        held = sum(stream.uncredited for stream in connection.streams.values())
        ended = sum(
            s.uncredited for i, s in self.streams.items() if s.closed and self.heard[i].whole
        )
        books = connection._receive_window + connection._consumed + held + ended
        assert books == connection.settings.connection_window


class _Sink:
    """Writes down; credits when the test says so."""

    def __init__(self, heard: Heard) -> None:
        self.heard = heard

    def answered(self, status: int, headers: Headers) -> None:
        assert self.heard.status is None
        assert headers == ()
        self.heard.status = status

    def data(self, view: memoryview) -> None:
        assert not self.heard.ended
        self.heard.received += view
        self.heard.uncredited += len(view)

    def ended(self) -> None:
        assert not self.heard.ended
        self.heard.ended = True

    def reset(self, code: int) -> None:
        del code
        self.heard.resets += 1
        self.heard.uncredited = 0

    def writable(self) -> None:
        """The test tries again anyway."""


class Theirs(_Books):
    """A hyper-h2 connection."""

    def __init__(self, role: Role) -> None:
        super().__init__()
        self.client = role is Role.CLIENT
        config = h2.config.H2Configuration(client_side=self.client, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.settings_sent = 1
        self.settings_acknowledged = 0

    def can_open(self) -> bool:
        limit = self.h2.remote_settings.max_concurrent_streams
        return self.client and self.h2.open_outbound_streams < limit

    def open(self) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, CONNECT)
        self.heard[stream_id] = Heard()
        return stream_id

    def answerable(self) -> list[int]:
        return [] if self.client else self.unanswered()

    def answer(self, stream_id: int, status: int) -> None:
        heard = self.heard[stream_id]
        heard.status = status
        heard.end_sent = status != 200
        self.h2.send_headers(stream_id, [(":status", str(status))], end_stream=heard.end_sent)

    def sending(self) -> list[int]:
        """A client of h2's may be impatient and send before the answer."""
        early = self.client
        return [
            i
            for i, h in self.heard.items()
            if (early or h.status == 200) and not h.end_sent and h.whole
        ]

    def endable(self) -> list[int]:
        return self.sending()

    def send(self, stream_id: int, payload: bytes) -> int:
        room = self.h2.local_flow_control_window(stream_id)
        payload = payload[: max(0, min(room, self.h2.max_outbound_frame_size))]
        if payload:
            self.h2.send_data(stream_id, payload)
            self.heard[stream_id].sent += payload
        return len(payload)

    def credit(self, stream_id: int, count: int) -> None:
        self.h2.acknowledge_received_data(self.taken(stream_id, count), stream_id)

    def end(self, stream_id: int) -> None:
        self.heard[stream_id].end_sent = True
        self.h2.end_stream(stream_id)

    def resettable(self) -> list[int]:
        return [i for i, h in self.heard.items() if h.whole and not (h.ended and h.end_sent)]

    def reset(self, stream_id: int, code: int) -> None:
        self.heard[stream_id].resets += 1
        self.h2.reset_stream(stream_id, code)

    def ping(self) -> None:
        self.h2.ping(b"from h2.")

    def may_change(self) -> bool:
        """What it announced before is acknowledged.

        h2 takes an ACK for one value of every setting that it has announced.
        """
        return self.settings_acknowledged == self.settings_sent

    def change(self, setting: SettingCodes, value: int) -> None:
        self.h2.update_settings({setting: value})
        self.settings_sent += 1
        if setting is SettingCodes.MAX_FRAME_SIZE:
            # By itself h2 refuses a larger frame that it is given together with the ACK.
            self.h2.max_inbound_frame_size = max(self.h2.max_inbound_frame_size, value)

    def take(self, most: int) -> bytes:
        return self.h2.data_to_send(most)

    def give(self, raw: bytes) -> None:
        for event in self.h2.receive_data(raw):
            self._note(event)

    def _note(self, event: Any) -> None:
        match event:
            case h2.events.RequestReceived(stream_id=int(stream_id)):
                assert tuple(event.headers or ()) == CONNECT
                self.heard[stream_id] = Heard()
            case h2.events.ResponseReceived(stream_id=int(stream_id)):
                self.heard[stream_id].status = int(dict(event.headers or ())[":status"])
            case h2.events.DataReceived(stream_id=int(stream_id)):
                self.heard[stream_id].received += event.data or b""
                self.heard[stream_id].uncredited += event.flow_controlled_length or 0
            case h2.events.StreamEnded(stream_id=int(stream_id)):
                self.heard[stream_id].ended = True
            case h2.events.StreamReset(stream_id=int(stream_id)):
                self.heard[stream_id].resets += 1
            case h2.events.SettingsAcknowledged():
                self.settings_acknowledged += 1

    def windows(self, stream_id: int) -> tuple[int, int] | None:
        heard = self.heard[stream_id]
        if not heard.whole or (heard.ended and heard.end_sent):
            return None
        return (
            self.h2.local_flow_control_window(stream_id),
            self.h2.remote_flow_control_window(stream_id),
        )
