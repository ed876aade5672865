"""A resolver outside the mesh whose answers depend on the name asked for, and apps that ask it."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from pyambient.dns.framing import Frames, framed
from pyambient.model.address import SocketAddress, from_sockaddr
from tests.bed import Channel, ClientOptions, apps
from tests.dns import build

PORT = 53
LONG = 3000
_LONGEST = 1 << 16


@dataclass(frozen=True, slots=True)
class Seen:
    """One query as the resolver sees it."""

    transport: str
    peer: SocketAddress
    ident: int


class _Resolver:
    """`big` does not fit into UDP, `silent` has no answer, `forged` gets forged ones first.

    `long` is as long as `big`, and for who takes that much.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.seen: list[Seen] = []
        self.selector = selectors.DefaultSelector()
        self.datagrams = apps.listener(PORT, kind=socket.SOCK_DGRAM)
        self.listening = apps.listener(PORT)
        self.selector.register(self.datagrams, selectors.EVENT_READ, self.on_datagram)
        self.selector.register(self.listening, selectors.EVENT_READ, self.on_connection)
        self.selector.register(channel, selectors.EVENT_READ, self.on_question)

    def on_datagram(self) -> None:
        asked, peer = self.datagrams.recvfrom(_LONGEST)
        self.note("udp", peer, asked)
        for answer in self.answers(asked, truncate=b"\3big" in asked):
            self.datagrams.sendto(answer, peer)

    def on_connection(self) -> None:
        connection, peer = self.listening.accept()
        frames = Frames()

        def on_bytes() -> None:
            data = connection.recv(_LONGEST)
            if not data:
                self.selector.unregister(connection)
                connection.close()
            frames.feed(data)
            while (asked := frames.next()) is not None:
                self.note("tcp", peer, asked)
                for answer in self.answers(asked, truncate=False):
                    connection.sendall(framed(answer))

        self.selector.register(connection, selectors.EVENT_READ, on_bytes)

    def answers(self, asked: bytes, *, truncate: bool) -> Iterator[bytes]:
        if b"\6silent" in asked:
            return
        if b"\6forged" in asked:
            yield build.answer_to(bytes((asked[0] ^ 1, asked[1])) + asked[2:], padding=1)
            yield build.answer_to(asked, padding=1).replace(b"\6forged", b"\6FORGED")
        if truncate:
            yield build.message(asked[:2], build.QR | build.TC, asked[12 : asked.index(0, 12) + 5])
        else:
            is_long = b"\3big" in asked or b"\4long" in asked
            yield build.answer_to(asked, padding=LONG if is_long else 0)

    def note(self, transport: str, peer: tuple[str, int], asked: bytes) -> None:
        self.seen.append(Seen(transport, from_sockaddr(peer), int.from_bytes(asked[:2])))

    def on_question(self) -> None:
        assert self.channel.receive() == "seen"
        self.channel.send(self.seen)
        self.seen = []

    def run(self) -> None:
        self.channel.send("listening")
        while True:
            for key, _ in self.selector.select():
                key.data()


def resolver(channel: Channel) -> None:
    """Answer on port 53, both families, UDP and TCP; to "seen" say what was asked since then."""
    _Resolver(channel).run()


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer, and who it came from as the app's socket says."""

    message: bytes
    sender: SocketAddress


def ask(address: SocketAddress, *messages: bytes, connected: bool = False) -> list[Answered]:
    """Ask over UDP from one socket, one after the other."""
    answers = []
    with ClientOptions(timeout=20).socket(address, socket.SOCK_DGRAM) as client:
        if connected:
            client.connect(address.sockaddr())
        for message in messages:
            client.send(message) if connected else client.sendto(message, address.sockaddr())
            answer, sender = client.recvfrom(_LONGEST)
            answers.append(Answered(answer, from_sockaddr(sender)))
    return answers


def ask_over_tcp(address: SocketAddress, *messages: bytes) -> list[bytes]:
    """Ask all at once on one connection; the answers in the order of their ids."""
    frames, answers = Frames(), []
    with ClientOptions(timeout=20).socket(address) as client:
        client.connect(address.sockaddr())
        client.sendall(b"".join(map(framed, messages)))
        while len(answers) < len(messages):
            data = client.recv(_LONGEST)
            assert data, f"the connection ended after {len(answers)} answers"
            frames.feed(data)
            while (answer := frames.next()) is not None:
                answers.append(answer)
    return sorted(answers)


def keep_asking(channel: Channel, address: SocketAddress) -> None:
    """Ask what one is told from one connected socket; the answer, or the errno."""
    with ClientOptions(timeout=20).socket(address, socket.SOCK_DGRAM) as client:
        client.connect(address.sockaddr())
        channel.send("ready")
        while True:
            message = channel.receive()
            try:
                client.send(message)
                channel.send(client.recv(_LONGEST))
            except OSError as error:
                channel.send(error.errno)


def flood(channel: Channel, address: SocketAddress, count: int) -> None:
    """Ask for as many names that have no answer, over and over, until ended."""
    queries = [build.query(n & 0xFFFF, f"silent.n{n}") for n in range(count)]
    with socket.socket(address.family, socket.SOCK_DGRAM) as client:
        client.connect(address.sockaddr())
        for query in queries:
            client.send(query)
        channel.send("flooded")
        while True:
            for query in queries:
                client.send(query)
