"""HBONE, the protocol of Istio ambient's tunnels, without I/O: bytes in, calls and bytes out.

HBONE is HTTP/2 (RFC 9113) over mutual TLS with one CONNECT stream per TCP connection. Nothing
here knows sockets, TLS or trio. The primitives:

* `Connection`: one end of a tunnel. The transport gives it what arrived (`receive`) and sends
  what it has (`pending`, `sent`).
* `Stream`: one tunnelled TCP connection. What happens to it is told to its `StreamSink`.
* `Owner`: who made the connection; it is told of requests, GOAWAY and the peer's SETTINGS.
* `Output`: a buffer for outgoing bytes. Payload is read from the app straight behind its frame
  header (`reserve`, `commit`); the `OutputPool` lends buffers to connections with unsent bytes.
* `LocalProtocolError` (the caller erred) and `RemoteProtocolError` (the peer did).
"""

from .connection import Connection
from .control import LocalSettings
from .errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from .frames import HEADER_SIZE
from .headers import Headers
from .interface import Owner, Role, StreamSink
from .output import Output, OutputPool
from .request import ConnectRequest
from .streams import Stream

__all__ = [
    "HEADER_SIZE",
    "ConnectRequest",
    "Connection",
    "ErrorCode",
    "Headers",
    "LocalProtocolError",
    "LocalSettings",
    "Output",
    "OutputPool",
    "Owner",
    "RemoteProtocolError",
    "Role",
    "Stream",
    "StreamSink",
]
