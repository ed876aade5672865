"""The other end of a ZDS connection in the hands of a test, and a handler that takes notes."""

from __future__ import annotations

import array
import os
import socket
from pathlib import Path
from typing import Any

import trio

from pyambient.errors import PyambientError
from pyambient.model.workload import PodRef
from pyambient.netns import Netns
from pyambient.zds.details import Explain, PodDetails
from pyambient.zds.messages import (
    Ack,
    Request,
    decode_ack,
    decode_request,
    encode_ack,
    encode_request,
)

ONE = PodRef("u1", "one", "default", "one")
TWO = PodRef("u2", "two", "default", "two")
HELLO = b"\x08\x01"


class Handler:
    """Notes what it is told; refuses the pods of these names, and describes nothing."""

    def __init__(self, *refusing: str) -> None:
        self.refusing = set(refusing)
        self.calls: list[str] = []
        self.called = trio.Event()
        self.keys: list[tuple[int, int]] = []

    async def add(self, pod: PodRef, netns: Netns) -> None:
        with netns:
            self.calls.append(f"add {pod.uid}")
            self.called.set()
            self.keys.append(netns.key)
            if pod.name in self.refusing:
                raise PyambientError("not wanted", "ask for another")

    async def remove(self, uid: str) -> None:
        self.calls.append(f"remove {uid}")

    async def retain(self, uids: frozenset[str]) -> None:
        self.calls.append(f"retain {sorted(uids)}")

    async def describe(self, uid: str, details: PodDetails) -> None:
        self.calls.append(f"describe {uid} {details.backend}")

    async def drain(self, uid: str, timeout: float) -> int:  # noqa: ASYNC109 - the protocol's
        self.calls.append(f"drain {uid} {timeout:g}")
        if uid == "slow":
            await trio.sleep_forever()
        return 3

    async def status(self, uid: str) -> dict[str, Any]:
        raise PyambientError(f"no pod {uid}")

    async def explain(self, question: Explain) -> dict[str, Any] | None:
        raise PyambientError(f"no pod {question.uid}")


class Other:
    """The other end of a connection: a plain socket."""

    def __init__(self, connection: trio.socket.SocketType) -> None:
        self.connection = connection

    async def ask(self, request: Request | bytes, *descriptors: int) -> Ack:
        """Send a request as an agent; the ack."""
        packet = request if isinstance(request, bytes) else encode_request(request)
        passed = array.array("i", descriptors)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)] if descriptors else []
        await self.connection.sendmsg([packet], ancillary)
        return decode_ack(await self.connection.recv(2048))

    async def asked(self) -> tuple[Request, list[int]]:
        """The next request as a proxy, and what came with it."""
        packet, ancillary, _, _ = await self.connection.recvmsg(2048, 256, socket.MSG_CMSG_CLOEXEC)
        passed = array.array("i")
        for _, _, data in ancillary:
            passed.frombytes(data)
        return decode_request(packet), list(passed)

    async def obey(self, *errors: str) -> list[Request]:
        """Acknowledge as many requests as there are errors given, "" for ok; the requests."""
        requests = []
        for error in errors:
            request, descriptors = await self.asked()
            for descriptor in descriptors:
                os.close(descriptor)
            requests.append(request)
            await self.connection.send(encode_ack(Ack(error)))
        return requests

    async def ended(self) -> bool:
        """Whether the end of the connection is all that comes."""
        try:
            return await self.connection.recv(2048) == b""
        except ConnectionResetError:
            return True


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
