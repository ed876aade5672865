"""What a tunnel says last arrives, though the peer goes on sending: no RST overtakes it."""

from __future__ import annotations

import socket
import struct

import pytest
import trio
from OpenSSL import SSL

from pyambient.engine.handshake import handshake
from pyambient.engine.loop import Loop
from pyambient.engine.pacing import Pacer
from pyambient.engine.relay import StreamRelay
from pyambient.engine.tls import SharedBuffers, TlsTransport
from pyambient.engine.tunnel import Tunnel
from pyambient.hbone import Connection, ErrorCode, OutputPool, Role
from pyambient.hbone.frames import (
    ACK,
    DATA,
    END_STREAM,
    GOAWAY,
    PING,
    PREFACE,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
)
from pyambient.hbone.request import ConnectRequest
from pyambient.identity.context import client_context, server_context
from tests.bed.patience import patience

from .rig import CLIENT, NOWHERE, SERVER, in_thread, tcp_pair, until

# Sent one by one they would fit; together they are in our socket's queue when the tunnel ends.
PINGS = 900
LATE = frame(PING, 0, 0, b"too late") * 500
# More than is read of it in a second.
MUCH = LATE * 36


class RawPeer:
    """A client by hand on a blocking socket that takes little at a time."""

    def __init__(self, sock, context):
        self.sock = sock
        self.tls = SSL.Connection(context, sock)
        self.tls.set_connect_state()
        self.received = bytearray()
        self.end = ""

    def read(self, count=1 << 14):
        """Take some; False, and `end` says how, when there is no more."""
        try:
            self.received += self.tls.recv(count)
        except SSL.ZeroReturnError:
            self.end = "close_notify"
        except SSL.Error as error:
            self.end = repr(error)
        return not self.end

    def read_all(self):
        while self.read():
            pass

    def frames(self):
        raw, at = self.received, 0
        while at + 9 <= len(raw):
            high, low, kind, flags, stream_id = struct.unpack_from(">HBBBL", raw, at)
            after = at + 9 + (high << 8 | low)
            yield kind, flags, stream_id, bytes(raw[at + 9 : after])
            at = after


class Host:
    """The tunnel under test, a server's; it accepts requests with the relay of `app`."""

    def __init__(self, loop):
        self.loop = loop
        self.tunnel = None
        self.app, self.near = tcp_pair()

    def requested(self, stream, _request):
        relay = StreamRelay(self.loop, self.near, self.tunnel)
        relay.stream = stream
        stream.sink = relay
        self.tunnel.connection.accept(stream)
        relay.watch()
        relay.open()

    def settled(self):
        pass

    def goaway(self, code):
        pass

    def drained(self):
        self.tunnel.finish("drained")


def hosted(authority, test):
    """Run `test(host, peer)` with TLS done and HTTP/2 not begun by the peer."""
    loop = Loop()

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as near:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            near.connect(listener.getsockname())
            far, _ = listener.accept()
            far.setblocking(False)
            peer = RawPeer(near, client_context(await authority.sign(CLIENT)))
            host = Host(loop)
            async with trio.open_nursery() as nursery:
                with trio.fail_after(patience(30)):
                    nursery.start_soon(in_thread, peer.tls.do_handshake)
                    context = server_context(await authority.sign(SERVER))
                    session = await handshake(far, context, Pacer(loop), server=True)
                    buffers = SharedBuffers()
                    transport = TlsTransport(far, session, buffers)
                    connection = Connection(Role.SERVER, host, OutputPool())
                    host.tunnel = Tunnel(loop, transport, connection, buffers, NOWHERE)
                    host.tunnel.start()
                    nursery.start_soon(host.tunnel.keep_alive)
                    await test(host, peer)
                host.tunnel.close("end of the test")
            host.app.close()
            host.near.close()

    loop.run(main)


def test_a_goaway_arrives_at_a_peer_that_goes_on_sending(authority):
    """It waits behind answers that the peer has not read yet, and the peer sends more."""

    async def test(host, peer):
        broken = frame(WINDOW_UPDATE, 0, 0, bytes(4))
        raw = PREFACE + frame(SETTINGS, 0, 0) + frame(PING, 0, 0, b"answer!!") * PINGS + broken
        await in_thread(peer.tls.sendall, raw)
        await host.tunnel.closed.wait()
        await in_thread(peer.tls.sendall, MUCH)
        await in_thread(peer.read_all)
        kinds = [kind for kind, flags, *_ in peer.frames() if (kind, flags) != (SETTINGS, 0)]
        assert kinds == [WINDOW_UPDATE, SETTINGS, *[PING] * PINGS, GOAWAY]
        assert list(peer.frames())[-1][3][4:8] == struct.pack(">L", ErrorCode.PROTOCOL_ERROR)
        assert peer.end == "close_notify"
        await host.tunnel.over.wait()
        assert "HTTP/2 error of the peer" in host.tunnel.reason

    hosted(authority, test)


def test_the_end_of_a_download_arrives_from_a_tunnel_that_is_drained(authority):
    """All was said and the tunnel is done, but the peer's kernel has not taken it all."""
    payload = bytes(1 << 20)

    async def test(host, peer):
        window = struct.pack(">L", 1 << 24)
        raw = PREFACE + frame(SETTINGS, 0, 0, b"\0\4" + window) + frame(WINDOW_UPDATE, 0, 0, window)
        block = ConnectRequest("192.0.2.1:80").encode()
        raw += frame(1, 4, 1, block) + frame(DATA, END_STREAM, 1)
        await in_thread(peer.tls.sendall, raw)

        def serve():
            host.app.sendall(payload)
            host.app.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, serve)
            await until(lambda: host.tunnel.connection.open_count == 1)
            host.tunnel.drain()
            pinged = False
            while not host.tunnel.is_closed:
                assert await in_thread(peer.read)
                if not pinged and b"goneaway" in peer.received:
                    pinged = True
                    await in_thread(peer.tls.sendall, frame(PING, ACK, 0, b"goneaway"))
        await in_thread(peer.tls.sendall, LATE)
        await in_thread(peer.read_all)
        data = [(flags, part) for kind, flags, _, part in peer.frames() if kind == DATA]
        assert sum(len(part) for _, part in data) == len(payload)
        assert data[-1][0] == END_STREAM
        assert peer.end == "close_notify"
        await host.tunnel.over.wait()

    hosted(authority, test)


@pytest.mark.interpreted
def test_a_peer_that_takes_nothing_is_not_waited_for_long(authority, monkeypatch):
    """It gets a second for a mistake of its own; then the socket is closed."""
    monkeypatch.setattr("pyambient.engine.tunnel._LAST_WORD_SECONDS", 0.1)

    async def test(host, peer):
        broken = frame(WINDOW_UPDATE, 0, 0, bytes(4))
        raw = PREFACE + frame(SETTINGS, 0, 0) + frame(PING, 0, 0, b"answer!!") * PINGS + broken
        await in_thread(peer.tls.sendall, raw)
        await host.tunnel.over.wait()
        assert host.tunnel._sock.fileno() == -1

    hosted(authority, test)
