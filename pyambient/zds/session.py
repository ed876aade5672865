"""The two ends of a ZDS connection as state machines: packets in, messages out, no I/O.

General theory of operation
---------------------------
The proxy says hello. The agent then names every pod of the node (Add with the network namespace,
or Keep without), says SnapshotSent, and from then on sends what changes (Add, Del). Each request
is answered by one Ack before the next is sent: an Ack names no request, so only the order ties
the two together, and one Ack too many or too few would shift all later ones. Both machines
therefore raise `ZdsError` at the first message out of turn; the transport then closes.
"""

from __future__ import annotations

from .messages import (
    Ack,
    Add,
    Del,
    Hello,
    Keep,
    Request,
    SnapshotSent,
    ZdsError,
    decode_ack,
    decode_hello,
    decode_request,
    encode_ack,
    encode_hello,
    encode_request,
)


class AgentSession:
    """The agent's end of one connection; at most one request is outstanding."""

    def __init__(self) -> None:
        self.greeted = False
        self.snapshot_sent = False
        self.outstanding: Request | None = None

    def receive(self, packet: bytes) -> Hello | Ack:
        """The proxy's hello first, then the Ack of the outstanding request."""
        if not self.greeted:
            hello = decode_hello(packet)
            self.greeted = True
            return hello
        if self.outstanding is None:
            raise ZdsError("an ack that answers nothing")
        ack = decode_ack(packet)
        self.outstanding = None
        return ack

    def request(self, request: Request) -> bytes:
        """The packet to send for `request`, which is outstanding from now on."""
        if not self.greeted or self.outstanding is not None:
            raise ZdsError(f"{request} is out of turn")
        if self.snapshot_sent and isinstance(request, (Keep, SnapshotSent)):
            raise ZdsError(f"{request} after the snapshot")
        packet = encode_request(request)
        self.snapshot_sent = self.snapshot_sent or isinstance(request, SnapshotSent)
        self.outstanding = request
        return packet

    def __repr__(self) -> str:
        state = "live" if self.snapshot_sent else "snapshot" if self.greeted else "hello"
        return f"<AgentSession {state} outstanding={self.outstanding}>"


class ProxySession:
    """The proxy's end of one connection.

    `named` are the uids of the snapshot so far: the pods to go on serving once `live`. `heard`
    tells that the agent has sent a request.
    """

    def __init__(self) -> None:
        self.heard = False
        self.live = False
        self.owed = False
        self.named: set[str] = set()

    def hello(self) -> bytes:
        return encode_hello(Hello())

    def receive(self, packet: bytes, descriptors: int) -> Request:
        """The agent's request in `packet`, which came with that many file descriptors.

        An ack is owed from here on, also when this raises.
        """
        if self.owed:
            raise ZdsError("a request before the last one was acknowledged")
        self.heard = self.owed = True
        request = decode_request(packet)
        wanted = 1 if isinstance(request, Add) else 0
        if descriptors != wanted:
            raise ZdsError(f"{type(request).__name__} came with {descriptors} file descriptors")
        self._note(request)
        return request

    def _note(self, request: Request) -> None:
        if self.live:
            if isinstance(request, (Keep, SnapshotSent)):
                raise ZdsError(f"{type(request).__name__} after the snapshot")
            return
        match request:
            case Add(pod):
                self.named.add(pod.uid)
            case Keep(uid):
                self.named.add(uid)
            case Del(uid):
                self.named.discard(uid)
            case SnapshotSent():
                self.live = True

    def acknowledge(self, error: str = "") -> bytes:
        """The packet that answers the last request; each is answered once."""
        if not self.owed:
            raise ZdsError("nothing to acknowledge")
        self.owed = False
        return encode_ack(Ack(error))

    def __repr__(self) -> str:
        state = "live" if self.live else "snapshot"
        return f"<ProxySession {state} {len(self.named)} pods named>"
