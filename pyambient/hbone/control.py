"""What hyper-h2 keeps: the preface, SETTINGS and PING.

h2 sees neither HEADERS nor DATA nor WINDOW_UPDATE, in either direction, so it has no streams and
its windows never move and cannot disagree with ours. It does not see GOAWAY either: after one it
refuses every other frame, while a draining tunnel still has to answer PINGs for as long as its
last stream lives.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass

import h2.config
import h2.connection
import h2.events
import h2.exceptions
from h2.settings import SettingCodes, Settings

from pyambient.model import numbers

from .errors import ErrorCode, RemoteProtocolError
from .frames import PING, SETTINGS, frame
from .interface import Role

_SETTING = struct.Struct(">HL")


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """What we tell and allow the peer, and how far we go ourselves; sizes in bytes."""

    stream_window: int = numbers.STREAM_WINDOW
    shared_stream_window: int = numbers.SHARED_STREAM_WINDOW
    connection_window: int = numbers.CONNECTION_WINDOW
    max_frame_accepted: int = numbers.MAX_FRAME_ACCEPTED
    max_frame_sent: int = numbers.MAX_FRAME_SENT
    max_streams_accepted: int = numbers.MAX_STREAMS_ACCEPTED
    max_streams_opened: int = numbers.MAX_STREAMS_OPENED
    max_header_list: int = numbers.MAX_HEADER_LIST

    @property
    def initial_window(self) -> int:
        """What a stream begins with."""
        return min(self.stream_window, self.shared_stream_window)

    def at_distance(self, round_trip: float) -> LocalSettings:
        """These, for a peer whose answers take so many seconds.

        A stream needs what fits on the way. What it is given beyond that waits in the peer's
        socket, ahead of all that the other streams of the tunnel have to say.
        """
        if round_trip >= numbers.NEAR_ROUND_TRIP:
            return self
        near = min(self.shared_stream_window, numbers.NEAR_STREAM_WINDOW)
        return dataclasses.replace(self, shared_stream_window=near)

    def for_wire(self, role: Role) -> Settings:
        """The SETTINGS that our preface carries."""
        values = {
            SettingCodes.INITIAL_WINDOW_SIZE: self.initial_window,
            SettingCodes.MAX_FRAME_SIZE: self.max_frame_accepted,
            SettingCodes.MAX_HEADER_LIST_SIZE: self.max_header_list,
            SettingCodes.ENABLE_PUSH: 0,
        }
        if role is Role.SERVER:
            values[SettingCodes.MAX_CONCURRENT_STREAMS] = self.max_streams_accepted
        return Settings(client=role is Role.CLIENT, initial_values=values)


class Control:
    """An h2 connection that is fed control frames only."""

    __slots__ = ("_h2",)

    def __init__(self, role: Role, settings: LocalSettings) -> None:
        config = h2.config.H2Configuration(client_side=role is Role.CLIENT, header_encoding=None)
        self._h2 = h2.connection.H2Connection(config)
        # Assigning single settings would wait for an ACK and never reach the preface.
        self._h2.local_settings = settings.for_wire(role)
        self._h2.max_inbound_frame_size = settings.max_frame_accepted

    @property
    def peer(self) -> Settings:
        """The peer's settings as last received."""
        return self._h2.remote_settings

    def start(self) -> None:
        """Make the preface and our SETTINGS."""
        self._h2.initiate_connection()

    def ping(self, payload: bytes) -> None:
        """Make a PING of eight bytes."""
        self._h2.ping(payload)

    def output(self) -> bytes:
        """What h2 has made since the last call."""
        return self._h2.data_to_send()

    def preface(self, part: memoryview) -> None:
        """Server: check some of the client's 24 bytes."""
        self._receive(bytes(part))

    def settings(self, flags: int, payload: memoryview) -> None:
        """Take SETTINGS or their acknowledgement."""
        self._receive(frame(SETTINGS, flags, 0, _known_settings(payload)))

    def pinged(self, flags: int, payload: memoryview) -> bytes | None:
        """Take a PING, which h2 answers; of an answer to ours, return the payload."""
        for event in self._receive(frame(PING, flags, 0, bytes(payload))):
            if isinstance(event, h2.events.PingAckReceived):
                return event.ping_data
        return None

    def _receive(self, raw: bytes) -> list[h2.events.Event]:
        try:
            return self._h2.receive_data(raw)
        except h2.exceptions.ProtocolError as error:
            # h2 has queued a GOAWAY that names no streams, because it knows none.
            self._h2.clear_outbound_data_buffer()
            code = ErrorCode(error.error_code)
            raise RemoteProtocolError(code, str(error) or type(error).__name__) from None


def _known_settings(payload: memoryview) -> bytes:
    """Without unknown settings, each of which h2 would remember for ever (there are 65,536)."""
    known = (s for s in _SETTING.iter_unpack(payload) if s[0] in _KNOWN)
    return b"".join(_SETTING.pack(code, value) for code, value in known)


_KNOWN = frozenset(int(code) for code in SettingCodes)
