"""DNS over TCP: several queries on a connection, whatever the resolver does with its own."""

from __future__ import annotations

import pytest
import trio

from pyambient.dns.message import FORMERR, SERVFAIL
from pyambient.model.numbers import DNS_PORT
from pyambient.proxy.dns import tcp
from tests.dns import build

from .dns_rig import forwarding, until


def test_pipelined_queries_share_a_connection_and_may_be_answered_in_any_order(
    bed, tmp_path, family
):
    """RFC 7766 sections 6.2.1.1 and 7: the ids tell answers apart; upstream they are ours."""

    async def test(dns):
        listener = await dns.tcp_server(family)
        client = await dns.tcp_client(family)
        await client.send(*(build.query(number) for number in range(5)))
        server = await dns.accept(listener)
        assert server.peer[0] == dns.app.address(family)
        seen = [await server.receive() for _ in range(5)]
        assert len({message[:2] for message in seen}) == 5
        answers = [build.answer_to(message, padding=n) for n, message in enumerate(seen)]
        await server.send(*reversed(answers))
        for number in reversed(range(5)):
            expected = build.answer_to(build.query(number), padding=number)
            assert await client.receive() == expected
        assert dns.counters.answered == 5

    forwarding(bed, tmp_path, test)


def test_one_message_may_come_in_pieces_and_be_as_long_as_can_be(bed, tmp_path):
    async def test(dns):
        listener = await dns.tcp_server("v4")
        client = await dns.tcp_client("v4")
        asked = build.query()
        for byte in len(asked).to_bytes(2) + asked:
            await client.connection.send(bytes((byte,)))
        server = await dns.accept(listener)
        seen = await server.receive()
        longest = build.answer_to(seen, padding=65535 - 49)
        await server.send(longest)
        assert await client.receive() == asked[:2] + longest[2:]

    forwarding(bed, tmp_path, test)


def test_a_client_that_has_said_fin_still_gets_its_answers(bed, tmp_path, family):
    async def test(dns):
        listener = await dns.tcp_server(family)
        client = await dns.tcp_client(family)
        await client.send(build.query(1), build.query(2))
        client.connection.shutdown(trio.socket.SHUT_WR)
        server = await dns.accept(listener)
        for _ in range(2):
            await server.send(build.answer_to(await server.receive()))
        assert (await client.receive())[:2] == b"\0\1"
        assert (await client.receive())[:2] == b"\0\2"
        assert await client.receive() is None
        assert await server.receive() is None

    forwarding(bed, tmp_path, test)


def test_a_resolver_that_refuses_tcp_is_servfail_and_the_connection_stays(bed, tmp_path, family):
    async def test(dns):
        client = await dns.tcp_client(family)
        for number in range(2):
            await client.send(build.query(number, edns=1232))
            answer = await client.receive()
            assert build.rcode(answer) == SERVFAIL
            assert b"over TCP: Connection refused" in answer

    forwarding(bed, tmp_path, test)


def test_a_resolver_that_is_silent_is_servfail_and_its_late_answer_goes_nowhere(bed, tmp_path):
    async def test(dns):
        dns.shorten_timeout()
        listener = await dns.tcp_server("v4")
        client = await dns.tcp_client("v4")
        await client.send(build.query(1))
        server = await dns.accept(listener)
        late = await server.receive()
        assert build.rcode(await client.receive()) == SERVFAIL
        dns.shorten_timeout(60)
        await client.send(build.query(2))
        seen = await server.receive()
        await server.send(build.answer_to(late), build.answer_to(seen))
        assert (await client.receive())[:2] == b"\0\2"
        assert dns.counters.mismatched == 1

    forwarding(bed, tmp_path, test)


def test_a_resolver_may_close_between_queries(bed, tmp_path):
    async def test(dns):
        listener = await dns.tcp_server("v4")
        client = await dns.tcp_client("v4")
        for number in range(3):
            await client.send(build.query(number))
            server = await dns.accept(listener)
            await server.send(build.answer_to(await server.receive()))
            server.close()
            assert build.rcode(await client.receive()) == 0

    forwarding(bed, tmp_path, test)


def test_a_query_whose_connection_ended_is_asked_once_more_and_no_more(bed, tmp_path):
    """RFC 7766 section 6.2.4."""

    async def test(dns):
        listener = await dns.tcp_server("v4")
        client = await dns.tcp_client("v4")
        await client.send(build.query(1))
        for _ in range(2):
            server = await dns.accept(listener)
            assert (await server.receive())[2:] == build.query()[2:]
            server.close()
        assert build.rcode(await client.receive()) == SERVFAIL
        await client.send(build.query(2))
        (await dns.accept(listener)).close()
        server = await dns.accept(listener)
        await server.send(build.answer_to(await server.receive()))
        assert build.rcode(await client.receive()) == 0

    forwarding(bed, tmp_path, test)


def test_a_transfer_has_as_many_answers_as_the_resolver_sends(bed, tmp_path):
    """RFC 5936: all bear the query's id, and those after the first may leave the question out."""

    async def test(dns):
        listener = await dns.tcp_server("v4")
        client = await dns.tcp_client("v4")
        asked = build.message(9, 0, build.question("example.com", build.AXFR))
        await client.send(asked)
        server = await dns.accept(listener)
        seen = await server.receive()
        flags = build.QR
        await server.send(
            build.message(seen[:2], flags, build.question("example.com", build.AXFR)),
            *(build.message(seen[:2], flags, b"", (build.address_record(),)) for _ in range(20)),
        )
        messages = [await client.receive() for _ in range(21)]
        assert {message[:2] for message in messages} == {b"\0\x09"}
        await client.send(build.query(10))
        await server.send(build.answer_to(await server.receive()))
        assert (await client.receive())[:2] == b"\0\x0a"

    forwarding(bed, tmp_path, test)


def test_malformed_messages_get_formerr_or_nothing_and_the_connection_stays(bed, tmp_path):
    async def test(dns):
        listener = await dns.tcp_server("v4")
        client = await dns.tcp_client("v4")
        await client.send(b"", b"x", build.answer_to(build.query()), build.query(3)[:20])
        answer = await client.receive()
        assert (answer[:2], build.rcode(answer)) == (b"\0\3", FORMERR)
        await client.send(build.query(4))
        server = await dns.accept(listener)
        await server.send(build.answer_to(await server.receive()))
        assert (await client.receive())[:2] == b"\0\4"
        assert dns.counters.malformed == 4

    forwarding(bed, tmp_path, test)


def test_a_connection_is_read_no_further_than_so_many_queries(bed, tmp_path):
    """A client that sends on and on waits in its own socket; all of it is answered in the end."""
    count = 3 * tcp.MAX_PIPELINED

    async def test(dns):
        listener = await dns.tcp_server("v4")
        client = await dns.tcp_client("v4")
        await client.send(*(build.query(number) for number in range(count)))
        server = await dns.accept(listener)
        first = [await server.receive() for _ in range(tcp.MAX_PIPELINED)]
        assert dns.worker.query_budget.in_flight == tcp.MAX_PIPELINED
        with trio.move_on_after(0.1):
            pytest.fail(f"one query too many: {await server.receive()!r}")
        await server.send(*map(build.answer_to, first))
        for _ in range(count - tcp.MAX_PIPELINED):
            await server.send(build.answer_to(await server.receive()))
        ids = [int.from_bytes((await client.receive())[:2]) for _ in range(count)]
        assert ids == list(range(count))

    forwarding(bed, tmp_path, test)


def test_answers_that_a_client_does_not_read_hold_its_resolver_up(bed, tmp_path):
    """What is kept for it is bounded, and it gets all of it when it reads."""
    count, size = tcp.MAX_PIPELINED, 60000

    async def test(dns):
        listener = await dns.tcp_server("v4")
        client = await dns.tcp_client("v4")
        await client.send(*(build.query(number) for number in range(count)))
        server = await dns.accept(listener)
        answers = [build.answer_to(await server.receive(), padding=size) for _ in range(count)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.send, *answers)
            await until(lambda: dns.counters.answered > 0)
            await trio.sleep(0.2)
            (connection,) = dns.forwarder()._connections.live
            assert connection._stream.unsent < 4 * size
            assert dns.counters.answered < count
            for number in range(count):
                assert int.from_bytes((await client.receive())[:2]) == number

    forwarding(bed, tmp_path, test)


async def connect_and_read(sock, address):
    """A reset may come before the connection is seen to be there, or after."""
    await sock.connect(address)
    await sock.recv(1)


def test_connections_beyond_the_pods_number_are_reset(bed, tmp_path, monkeypatch):
    monkeypatch.setattr(tcp, "MAX_CONNECTIONS", 2)

    async def test(dns):
        clients = [await dns.tcp_client("v4") for _ in range(2)]
        await until(lambda: dns.counters.connections == 2)
        with pytest.raises(ConnectionResetError):
            await connect_and_read(
                dns.open(dns.app, "v4", trio.socket.SOCK_STREAM), (dns.resolver.ipv4, 53)
            )
        assert dns.counters.connections_refused == 1
        another_pods = await dns.tcp_client("v4", dns.other)
        await until(lambda: dns.forwarder(dns.other).counters.connections == 1)
        clients.pop().close()
        await until(lambda: len(dns.forwarder()._connections.live) == 1)
        await dns.tcp_client("v4")
        await until(lambda: dns.counters.connections == 3)
        another_pods.close()

    forwarding(bed, tmp_path, test)


def test_an_idle_connection_is_closed_and_a_busy_one_is_not(bed, tmp_path, monkeypatch):
    monkeypatch.setattr(tcp, "DNS_IDLE_TIMEOUT", 0.2)

    async def test(dns):
        dns.worker.dns_idle.seconds = 0.05
        await dns.tcp_server("v4")
        busy, idle = await dns.tcp_client("v4"), await dns.tcp_client("v4")
        await busy.send(build.query())
        assert await idle.receive() is None
        assert len(dns.forwarder()._connections.live) == 1

    forwarding(bed, tmp_path, test)


def test_what_goes_to_the_pod_itself_is_reset(bed, tmp_path, family):
    """Its own port 15053, from inside and outside, and port 53 of its own address."""

    async def test(dns):
        own = dns.app.address(family)
        for pod, port in ((dns.app, DNS_PORT), (dns.other, DNS_PORT), (dns.app, 53)):
            with pytest.raises(ConnectionResetError):
                await connect_and_read(dns.open(pod, family, trio.socket.SOCK_STREAM), (own, port))
        assert dns.counters.connections == 0
        assert dns.counters.from_strangers == 1
        assert dns.counters.refused == 1

    forwarding(bed, tmp_path, test)


def test_draining_ends_idle_connections_at_once_and_busy_ones_with_their_answer(bed, tmp_path):
    async def test(dns):
        listener = await dns.tcp_server("v4")
        busy, idle = await dns.tcp_client("v4"), await dns.tcp_client("v4")
        await busy.send(build.query())
        server = await dns.accept(listener)
        seen = await server.receive()
        await until(lambda: dns.counters.connections == 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dns.rig.pods.drain, dns.app.name, 20)
            assert await idle.receive() is None
            await server.send(build.answer_to(seen))
            assert build.rcode(await busy.receive()) == 0
            assert await busy.receive() is None

    forwarding(bed, tmp_path, test)
