"""A proxied connection with no tunnel: dial the far end, join the two sockets, log the end."""

from __future__ import annotations

import socket
from collections.abc import Callable

from pyambient.engine.accept import Dial, connect
from pyambient.engine.loop import RESET
from pyambient.engine.plain import PlainRelay
from pyambient.engine.relay import reset
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import CONNECT_TIMEOUT
from pyambient.model.policy import ConnectionFacts
from pyambient.observe.accesslog import ConnectionRecord

from .worker import PodScope

PLAIN_DESCRIPTORS = 2


class PlainConnection:
    """One plain connection, from the accepted (near) socket on."""

    __slots__ = ("_dial", "_far", "_near", "_record", "_relay", "_scope", "_target", "facts")

    def __init__(
        self,
        scope: PodScope,
        near: socket.socket,
        record: ConnectionRecord,
        facts: ConnectionFacts | None = None,
        descriptors: int = PLAIN_DESCRIPTORS,
    ) -> None:
        """Take over `near`; `facts` are those that policies have let in.

        `descriptors` is how many of its sockets the pod answers for.
        """
        self.facts = facts
        self._scope = scope
        self._near = near
        self._record = record
        self._far: socket.socket | None = None
        self._dial: Dial | None = None
        self._relay: PlainRelay | None = None
        self._target = record.destination
        scope.track(self, descriptors)

    def begin(self, far_socket: Callable[[], socket.socket], target: SocketAddress) -> None:
        """Dial `target` with the socket that `far_socket()` makes; its OSError is a refusal."""
        worker = self._scope.worker
        self._target = target
        try:
            self._far = far_socket()
            connected = connect(self._far, target)
        except OSError as error:
            self._fail(self._explain(error))
            return
        if connected:
            self._dialled(None)
        else:
            worker.loop.watch(self._near.fileno(), self._near_gone, RESET)
            self._dial = Dial(worker.loop, self._far, worker.connects, self._dialled)

    @property
    def finished(self) -> bool:
        return self._near.fileno() < 0

    def abort(self, error: str) -> None:
        """Give the connection up, whatever it is doing; the near side sees a reset."""
        if self._relay is not None:
            self._relay.abort(error)
        elif not self.finished:
            if self._dial is not None:
                self._dial.cancel()
            self._fail(error)

    def _near_gone(self, _mask: int) -> None:
        """The near side was reset while its far end is dialled: nobody waits for that any more."""
        self.abort("client disconnected before the connection was made")

    def crashed(self, error: BaseException) -> None:
        self.abort(f"internal error: {error!r}")

    def _dialled(self, error: OSError | None) -> None:
        self._scope.worker.loop.unwatch(self._near.fileno())
        if error is not None:
            self._fail(self._explain(error))
            return
        scope, far = self._scope, self._far
        assert far is not None  # noqa: S101 - begin() made it
        worker = scope.worker
        relay = PlainRelay(worker.loop, self._near, far, worker.buffers, scope.splicer)
        relay.reservoir = scope.budget.buffered
        self._relay = relay
        relay.on_finished = self._relay_finished
        self._log_opened()
        relay.start()

    def _log_opened(self) -> None:
        self._scope.worker.access_log.opened(self._record)

    def _explain(self, error: OSError) -> str:
        if isinstance(error, TimeoutError):
            return (
                f"connection timed out: no answer from {self._target} in {CONNECT_TIMEOUT:g} s, "
                "check that it is up and that no NetworkPolicy or firewall drops it"
            )
        return f"connection failed: {error.strerror}"

    def _fail(self, error: str) -> None:
        self._record.error = error
        self._scope.worker.loop.unwatch(self._near.fileno())
        if self._far is not None:
            self._far.close()
        reset(self._near)
        self._end()

    def _relay_finished(self, relay: PlainRelay) -> None:
        record = self._record
        sent, received = relay.bytes_from_near, relay.bytes_from_far
        if record.direction == "inbound":
            # Counted from the app's viewpoint, and here the app is the far side.
            sent, received = received, sent
        record.bytes_sent, record.bytes_received = sent, received
        record.error = relay.error
        self._end()

    def _end(self) -> None:
        self._scope.finish(self, self._record)

    def __repr__(self) -> str:
        return f"<PlainConnection {self._record.source} to {self._target}>"
