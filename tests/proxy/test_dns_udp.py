"""DNS over UDP: passed on unseen, answered once, and never by anybody but the resolver asked."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import resource
import socket
from pathlib import Path

import pytest
import trio

from pyambient.dns.message import FORMERR, SERVFAIL
from pyambient.model.numbers import DNS_PORT, QUERIES_IN_FLIGHT
from tests.dns import build

from .dns_rig import ARRIVAL, forwarding, is_readable, until

_SO_RCVBUFFORCE = 33


def test_a_query_reaches_the_resolver_asked_and_its_answer_the_app(bed, tmp_path, family):
    """Nothing but the id is changed, and the app's connected socket takes the answer."""

    async def test(dns):
        server = await dns.udp_server(family)
        client = await dns.client(family)
        asked = build.query(edns=1232)
        await client.send(asked)
        seen, peer = await server.recvfrom(4096)
        assert seen[2:] == asked[2:]
        assert peer[0] == dns.app.address(family)
        answer = build.answer_to(seen, padding=500, more=build.opt(4096))
        await server.sendto(answer, peer)
        assert await client.recv(4096) == asked[:2] + answer[2:]
        assert dns.counters.answered == 1

    forwarding(bed, tmp_path, test)


def test_pods_have_each_their_own_forwarder(bed, tmp_path, family):
    async def test(dns):
        server = await dns.udp_server(family)
        for pod in (dns.app, dns.other):
            client = await dns.client(family, pod)
            await client.send(build.query())
            seen, peer = await server.recvfrom(4096)
            assert peer[0] == pod.address(family)
            await server.sendto(build.answer_to(seen), peer)
            assert build.rcode(await client.recv(4096)) == 0
        assert [dns.forwarder(p).counters.answered for p in (dns.app, dns.other)] == [1, 1]

    forwarding(bed, tmp_path, test)


def test_ids_and_source_ports_are_new_and_random_for_every_query(bed, tmp_path):
    """300 queries of one client with ids that count up: as many ports, spread over their range."""
    count = 300

    async def test(dns):
        server = await dns.udp_server("v4")
        client = await dns.client("v4")
        seen = []
        for number in range(count):
            await client.send(build.query(number))
            message, peer = await server.recvfrom(4096)
            seen.append((int.from_bytes(message[:2]), peer[1]))
        ids, ports = zip(*seen, strict=True)
        for numbers in (ids, ports):
            steps = {b - a for a, b in itertools.pairwise(numbers)}
            assert len(set(numbers)) > 0.9 * count
            assert len(steps) > 0.9 * count
        assert max(ids) - min(ids) > 1 << 15
        assert max(ports) - min(ports) > 1 << 14

    forwarding(bed, tmp_path, test)


def test_forged_answers_are_ignored_and_the_right_one_still_counts(bed, tmp_path, family):
    async def test(dns):
        server = await dns.udp_server(family)
        other_port = dns.open(dns.resolver, family)
        stranger = dns.open(dns.other, family)
        client = await dns.client(family)
        await client.send(build.query())
        seen, peer = await server.recvfrom(4096)
        good = build.answer_to(seen)
        wrong_id = bytes((seen[0] ^ 1, seen[1])) + good[2:]
        for forged in (
            wrong_id,
            good.lower(),
            build.answer_to(build.query(int.from_bytes(seen[:2]), "www.example.org")),
            seen,
            good[:11],
        ):
            await server.sendto(forged, peer)
        await other_port.sendto(good, peer)
        await stranger.sendto(good, peer)
        await until(lambda: dns.counters.mismatched == 5)
        await server.sendto(build.answer_to(seen, padding=9), peer)
        assert await client.recv(4096) == build.answer_to(build.query(), padding=9)

    forwarding(bed, tmp_path, test)


def test_who_guesses_ids_by_the_dozen_ends_the_query_instead(bed, tmp_path):
    async def test(dns):
        server = await dns.udp_server("v4")
        client = await dns.client("v4")
        await client.send(build.query())
        seen, peer = await server.recvfrom(4096)
        good = build.answer_to(seen)
        for guess in range(1, 100):
            await server.sendto(bytes((seen[0], seen[1] ^ guess)) + good[2:], peer)
        assert build.rcode(await client.recv(4096)) == SERVFAIL

    forwarding(bed, tmp_path, test)


def test_a_client_that_asks_again_is_passed_on_again_and_answered_once(bed, tmp_path):
    """The same socket and id: another pair would double a forger's chances; and it is bounded."""

    async def test(dns):
        server = await dns.udp_server("v4")
        client = await dns.client("v4")
        for _ in range(8):
            await client.send(build.query())
        seen = [await server.recvfrom(4096) for _ in range(4)]
        assert len(set(seen)) == 1
        await until(lambda: dns.counters.repeated == 7)
        assert dns.worker.query_budget.in_flight == 1
        message, peer = seen[0]
        await server.sendto(build.answer_to(message), peer)
        assert await client.recv(4096) == build.answer_to(build.query())
        assert not is_readable(client)
        assert not is_readable(server)

    forwarding(bed, tmp_path, test)


def test_a_resolver_that_is_not_there_is_servfail(bed, tmp_path, family):
    """The ICMP error says so at once."""

    async def test(dns):
        client = await dns.client(family)
        await client.send(build.query(edns=1232))
        answer = await client.recv(4096)
        assert build.rcode(answer) == SERVFAIL
        assert b"cannot be reached: Connection refused" in answer

    forwarding(bed, tmp_path, test)


def test_a_resolver_that_is_silent_is_servfail(bed, tmp_path, family):
    async def test(dns):
        dns.shorten_timeout()
        await dns.udp_server(family)
        client = await dns.client(family)
        await client.send(build.query())
        answer = await client.recv(4096)
        assert (answer[:2], build.rcode(answer)) == (build.query()[:2], SERVFAIL)
        assert dns.worker.query_budget.in_flight == 0

    forwarding(bed, tmp_path, test)


@pytest.mark.parametrize(
    ("edns", "padding", "truncated"),
    [(0, 400, False), (0, 600, True), (1232, 1100, False), (1232, 1400, True), (8192, 8000, False)],
)
def test_what_the_client_cannot_take_over_udp_is_truncated(bed, tmp_path, edns, padding, truncated):
    async def test(dns):
        server = await dns.udp_server("v4")
        client = await dns.client("v4")
        await client.send(build.query(edns=edns))
        seen, peer = await server.recvfrom(4096)
        await server.sendto(build.answer_to(seen, padding=padding), peer)
        answer = await client.recv(1 << 16)
        assert bool(answer[2] & 2) is truncated
        assert len(answer) <= max(edns, 512)
        assert (len(answer) > padding) is not truncated
        assert dns.counters.truncated == truncated

    forwarding(bed, tmp_path, test)


def test_the_resolvers_own_truncation_is_passed_on(bed, tmp_path):
    async def test(dns):
        server = await dns.udp_server("v4")
        client = await dns.client("v4")
        await client.send(build.query())
        seen, peer = await server.recvfrom(4096)
        await server.sendto(build.message(seen[:2], build.QR | build.TC, build.question()), peer)
        answer = await client.recv(4096)
        assert answer == build.message(0x1234, build.QR | build.TC, build.question())

    forwarding(bed, tmp_path, test)


def test_malformed_queries_get_formerr_or_nothing_and_harm_nobody(bed, tmp_path):
    async def test(dns):
        server = await dns.udp_server("v4")
        client = await dns.client("v4")
        for silent in (b"", b"x", build.query()[:11], build.answer_to(build.query())):
            await client.send(silent)
        await client.send(build.query()[:20])
        assert build.rcode(await client.recv(4096)) == FORMERR
        for _ in range(100):
            await client.send(build.query()[:4] + os.urandom(50))
        await until(lambda: dns.counters.malformed > 50)
        fresh = await dns.client("v4")
        await fresh.send(build.query(0x7777, "good.example"))
        while True:
            seen, peer = await server.recvfrom(4096)
            if b"\4good" in seen:
                break
        await server.sendto(build.answer_to(seen), peer)
        assert (await fresh.recv(4096))[:2] == b"\x77\x77"

    forwarding(bed, tmp_path, test)


def test_nobody_but_the_pod_is_answered_and_its_own_port_is_no_resolver(bed, tmp_path, family):
    async def test(dns):
        stranger = dns.open(dns.other, family)
        own = dns.open(dns.app, family)
        await stranger.sendto(build.query(), (dns.app.address(family), DNS_PORT))
        await own.sendto(build.query(), (dns.app.address(family), DNS_PORT))
        await own.sendto(build.query(), (ARRIVAL[family], DNS_PORT))
        await until(lambda: dns.counters.from_strangers == 1)
        await until(lambda: dns.counters.without_resolver == 2)
        assert dns.worker.query_budget.in_flight == 0
        assert not is_readable(stranger)
        assert not is_readable(own)

    forwarding(bed, tmp_path, test)


@contextlib.contextmanager
def descriptors(limit):
    """Allow this process `limit` descriptors, as far as its hard limit lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_4096_queries_are_in_flight_and_one_more_is_dropped(bed, tmp_path):
    beyond = 100

    async def test(dns):
        server = await dns.udp_server("v4")
        server.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        client = await dns.client("v4")
        for number in range(QUERIES_IN_FLIGHT + beyond):
            await client.send(build.query(number))
            if number % 64 == 63:
                await until(functools.partial(has_come, dns, number + 1))
        await until(lambda: dns.forwarder().dropped == beyond)
        assert dns.worker.query_budget.in_flight == QUERIES_IN_FLIGHT
        for _ in range(QUERIES_IN_FLIGHT):
            seen, peer = await server.recvfrom(4096)
            await server.sendto(build.answer_to(seen), peer)
            assert build.rcode(await client.recv(4096)) == 0
        assert dns.counters.answered == QUERIES_IN_FLIGHT
        assert dns.worker.query_budget.in_flight == 0

    def has_come(dns, count):
        return dns.counters.queries + dns.forwarder().dropped == count

    with descriptors(2 * QUERIES_IN_FLIGHT):
        forwarding(bed, tmp_path, lambda dns: patient(dns, test))


async def patient(dns, test):
    """Run `test` with time enough for a slow machine to get the queries answered at all."""
    dns.shorten_timeout(60)
    await test(dns)


def test_a_flood_of_one_pod_leaves_room_for_another(bed, tmp_path):
    """The oldest of the flood are given up, not the other pod's query; nothing is left over."""

    async def test(dns):
        dns.worker.query_budget._limit = 8
        server = await dns.udp_server("v4")
        flood, quiet = await dns.client("v4"), await dns.client("v4", dns.other)
        for number in range(40):
            await flood.send(build.query(number))
        await until(lambda: dns.forwarder().dropped == 32)
        for number in range(4):
            await quiet.send(build.query(number))
        await until(lambda: dns.forwarder(dns.other).counters.queries == 4)
        assert dns.forwarder().dropped == 36
        asked = [await server.recvfrom(4096) for _ in range(12)]
        for seen, peer in asked:
            await server.sendto(build.answer_to(seen), peer)
        for _ in range(4):
            assert build.rcode(await quiet.recv(4096)) == 0
        await until(lambda: dns.worker.query_budget.in_flight == 0)
        assert (dns.counters.answered, dns.forwarder(dns.other).counters.answered) == (4, 4)

    forwarding(bed, tmp_path, test)


def test_without_descriptors_the_client_is_told_and_the_next_query_works(bed, tmp_path):
    async def test(dns):
        server = await dns.udp_server("v4")
        client = await dns.client("v4")
        with descriptors(0):
            await client.send(build.query(edns=1232))
            answer = await client.recv(4096)
        assert build.rcode(answer) == SERVFAIL
        assert b"Too many open files" in answer
        await client.send(build.query())
        seen, peer = await server.recvfrom(4096)
        await server.sendto(build.answer_to(seen), peer)
        assert build.rcode(await client.recv(4096)) == 0

    forwarding(bed, tmp_path, test)


def test_what_is_in_flight_is_answered_while_the_pod_drains(bed, tmp_path):
    async def test(dns):
        server = await dns.udp_server("v4")
        client = await dns.client("v4")
        await client.send(build.query())
        seen, peer = await server.recvfrom(4096)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dns.rig.pods.drain, dns.app.name, 20)
            await until(lambda: dns.rig.pods._pods[dns.app.name].draining)
            await server.sendto(build.answer_to(seen), peer)
            assert build.rcode(await client.recv(4096)) == 0

    forwarding(bed, tmp_path, test)


def test_a_pod_that_ends_leaves_no_socket_and_no_query(bed, tmp_path):
    async def test(dns):
        server = await dns.udp_server("v4")
        before = open_descriptors()
        client = await dns.client("v4", dns.other)
        for number in range(50):
            await client.send(build.query(number))
        for _ in range(50):
            await server.recvfrom(4096)
        assert open_descriptors() >= before + 50
        dns.rig.pods._end(dns.other.name, "test")
        assert dns.worker.query_budget.in_flight == 0
        await until(lambda: open_descriptors() < before)

    forwarding(bed, tmp_path, test)
