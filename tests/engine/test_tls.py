"""TLS transports over memory BIOs, by the raw and by the public calls."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from contextlib import nullcontext

import pytest
import trio

from pyambient.engine.handshake import HandshakeFailed, handshake
from pyambient.engine.tls import Fill, SharedBuffers, TlsError, TlsTransport
from pyambient.identity.context import client_context, server_context
from pyambient.model.spiffe import SpiffeId

CLIENT = SpiffeId("cluster.local", "default", "client")
SERVER = SpiffeId("cluster.local", "default", "server")


@pytest.fixture
def sockets():
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    for sock in (client, accepted):
        sock.setblocking(False)
    yield client, accepted
    client.close()
    accepted.close()


def handshaken(authority, sockets):
    """The TLS connections of both ends, after a mutual handshake."""

    async def both():
        sessions = {}

        async def one(name, sock, context, *, server):
            sessions[name] = await handshake(sock, context, nullcontext(), server=server)

        client_cert = await authority.sign(CLIENT)
        server_cert = await authority.sign(SERVER)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                client, server = sockets

                async def run(name, sock, context, server):
                    await one(name, sock, context, server=server)

                nursery.start_soon(run, "client", client, client_context(client_cert), False)
                nursery.start_soon(run, "server", server, server_context(server_cert), True)
        return sessions["client"], sessions["server"]

    return trio.run(both)


@pytest.fixture(params=["raw", "public"])
def pair(request, authority, sockets):
    """Two transports joined by TCP, and the receive buffers of each."""
    raw = request.param == "raw"
    sessions = handshaken(authority, sockets)
    buffers = SharedBuffers(), SharedBuffers()
    transports = tuple(
        TlsTransport(sock, session, own, raw=raw)
        for sock, session, own in zip(sockets, sessions, buffers, strict=True)
    )
    kind = type(transports[0]._calls).__name__
    assert kind == {"raw": "_RawCalls", "public": "_PublicCalls"}[request.param]
    return transports, buffers


def receive(transport, buffers, wanted):
    """Fill until `wanted` bytes are there."""
    data = b""
    while len(data) < wanted:
        count, state = transport.fill()
        data += buffers.plain_view[:count]
        assert state is not Fill.EOF
    return data


def test_small_messages_both_ways(pair):
    (client, server), (client_buffers, server_buffers) = pair
    assert client.send(memoryview(b"hello")) == 5
    assert receive(server, server_buffers, 5) == b"hello"
    assert server.send(memoryview(b"world")) == 5
    assert receive(client, client_buffers, 5) == b"world"
    assert client.fill() == (0, Fill.DRAINED)


def test_bulk_arrives_whole_through_blocked_sockets(pair):
    (client, server), (_, server_buffers) = pair
    payload = os.urandom(24 << 20)
    received = []
    reader = threading.Thread(  # noqa: TID251 - no trio in this test
        target=lambda: received.append(receive(server, server_buffers, len(payload)))
    )
    view = memoryview(payload)
    while not client.blocked:
        view = view[client.send(view) :]
    reader.start()
    while view:
        view = view[client.send(view) :]
    while client.blocked:
        client.push()
    reader.join(20)
    assert received == [payload]


def test_fill_says_more_when_the_plain_buffer_is_full(pair):
    (client, server), (_, server_buffers) = pair
    payload = b"x" * (300 << 10)
    view = memoryview(payload)
    got, states = 0, []
    while got < len(payload):
        if view or client.blocked:
            view = view[client.send(view) :] if view else view
            client.push()
        count, state = server.fill()
        got += count
        states.append(state)
    assert got == len(payload)
    del server_buffers


def test_a_blocked_transport_takes_nothing_more(pair):
    (client, _server), _ = pair
    chunk = memoryview(bytes(256 << 10))
    for _ in range(1000):
        if client.send(chunk) == 0:
            break
    assert client.blocked
    assert client.send(chunk) == 0


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33."""

    _fields_ = [(f"field{n}", ctypes.c_size_t) for n in range(10)]


def allocated():
    """Bytes that malloc has handed out: in the heap (uordblks) and mapped (hblkhd)."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    return info.field7 + info.field4


def exchange(pair, payload):
    """All of `payload`, there and back."""
    for (sender, receiver), (_, buffers) in (pair, [end[::-1] for end in pair]):
        view, got = memoryview(payload), b""
        while len(got) < len(payload):
            if view:
                view = view[sender.send(view) :]
            sender.push()
            count, _ = receiver.fill()
            got += buffers.plain_view[:count]
        assert got == payload


def test_an_idle_transport_gives_back_what_its_bios_grew_to(pair):
    """A memory BIO keeps the size of its largest batch; ten thousand tunnels would keep as many."""
    exchange(pair, b"small")
    before = allocated()
    exchange(pair, os.urandom(1 << 20))
    grown = allocated() - before
    assert grown > 300 << 10
    for transport in pair[0]:
        transport.give_back()
    assert allocated() - before > 300 << 10, "not before it was idle for a while"
    for transport in pair[0]:
        transport.give_back()
    if type(pair[0][0]._calls).__name__ == "_RawCalls":
        assert allocated() - before < 100 << 10
    exchange(pair, os.urandom(1 << 20))
    exchange(pair, b"still alive")


def test_bios_that_hold_something_are_kept(pair):
    """Ciphertext that the socket has not taken is not lost."""
    (client, server), (_, buffers) = pair
    payload = os.urandom(256 << 10)
    sent = 0
    while not client.blocked:
        sent += client.send(memoryview(payload))
    client.give_back()
    client.give_back()
    got = receive(server, buffers, len(payload))
    while len(got) < sent:
        client.push()
        count, _ = server.fill()
        got += buffers.plain_view[:count]
    assert got == payload * (sent // len(payload))


def test_close_notify_and_a_bare_close_are_the_end(pair):
    (client, server), _ = pair
    client.shutdown()
    assert server.fill() == (0, Fill.EOF)
    server.sock.close()
    # What the server sent last (session tickets) may come first; epoll would say readable again.
    assert Fill.EOF in {client.fill()[1], client.fill()[1]}


def test_garbage_from_the_peer_is_a_tls_error_with_a_reason(pair):
    (client, server), _ = pair
    client.sock.send(b"this is no TLS record at all, not even close")
    with pytest.raises(TlsError, match=r"\w+"):
        server.fill()


def test_a_handshake_with_a_peer_that_speaks_no_tls_fails(authority, sockets):
    async def main():
        client, server = sockets
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        context = server_context(await authority.sign(SERVER))
        with trio.fail_after(5), pytest.raises(HandshakeFailed, match=r"(?i)http request|version"):
            await handshake(server, context, nullcontext(), server=True)

    trio.run(main)


def test_a_handshake_whose_peer_leaves_fails(authority, sockets):
    async def main():
        client, server = sockets
        client.close()
        context = server_context(await authority.sign(SERVER))
        with trio.fail_after(5), pytest.raises(HandshakeFailed, match="closed the connection"):
            await handshake(server, context, nullcontext(), server=True)

    trio.run(main)
