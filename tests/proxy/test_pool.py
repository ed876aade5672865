"""The pool: tunnels are shared, opened once, left when they are of no use; failures reach all."""

from __future__ import annotations

import pytest

from pyambient.hbone import ConnectRequest
from pyambient.model.numbers import HBONE_PORT, MAX_STREAMS_OPENED
from pyambient.proxy import pool as pool_module
from tests.bed import apps
from tests.bed.descriptors import descriptors_left

from .rig import Asked, proxied, until


class Sink:
    """A stream's sink that only remembers."""

    def __init__(self):
        self.status = None

    def answered(self, status, _headers):
        self.status = status

    def data(self, _view):
        raise AssertionError("nobody sends here")

    def ended(self):
        pass

    def reset(self, code):
        pass

    def writable(self):
        pass


def open_stream(tunnel, authority):
    sink = Sink()
    stream = tunnel.connection.open(ConnectRequest(authority), sink)
    tunnel.loop.flush_soon(tunnel)
    return stream, sink


async def asked(pool, key, count=1):
    waiting = [Asked(pool, key) for _ in range(count)]
    for one in waiting:
        await one.told.wait()
    return waiting


def test_connections_that_come_at_once_share_one_tunnel(bed, tmp_path):
    """Opening is single-flight: fifty waiters, one handshake."""
    client, server = bed.pod("client"), bed.pod("server")

    async def test(rig):
        await rig.serve(server)
        pool = rig.pool(client)
        waiting = await asked(pool, rig.key(client, server), 50)
        assert len({one.tunnel for one in waiting}) == 1
        assert str(waiting[0].peer) == "spiffe://cluster.local/ns/default/sa/server"
        again = Asked(pool, rig.key(client, server))
        assert again.tunnel is waiting[0].tunnel, "a tunnel that is up is given at once"
        pool.close("end of the test")

    proxied(bed, tmp_path, test)


def test_a_failure_wakes_every_waiter_with_its_reason(bed, tmp_path):
    client, server = bed.pod("client"), bed.pod("server")

    async def test(rig):
        waiting = await asked(rig.pool(client), rig.key(client, server), 20)
        assert {one.failure for one in waiting} == {"connection failed: Connection refused"}

    proxied(bed, tmp_path, test)


def test_without_descriptors_every_waiter_is_told_and_the_pod_lives_on(bed, tmp_path):
    """No socket for a tunnel is a failure like others; the next connection gets its tunnel."""
    client, server = bed.pod("client"), bed.pod("server")

    async def test(rig):
        await rig.serve(server)
        pool, key = rig.pool(client), rig.key(client, server)
        (first,) = await asked(pool, key)
        pool.close("to have none")
        await first.tunnel.closed.wait()
        with descriptors_left(0):
            waiting = await asked(pool, key, 20)
        assert {one.failure for one in waiting} == {"connection failed: Too many open files"}
        (one,) = await asked(pool, key)
        assert one.failure == ""
        pool.close("end of the test")

    proxied(bed, tmp_path, test)


def test_an_unexpected_server_is_left_before_connect(bed, tmp_path):
    client, server = bed.pod("client"), bed.pod("server")

    async def test(rig):
        await rig.serve(server)
        key = rig.key(client, server, expected="somebody-else")
        (one,) = await asked(rig.pool(client), key)
        assert "identity error: the server is spiffe://cluster.local" in one.failure
        assert "somebody-else" in one.failure

    assert proxied(bed, tmp_path, test) == []


def test_a_full_tunnel_gets_a_second_one_beside_it(bed, tmp_path):
    """A hundred streams a tunnel; when some have ended the first one is used again."""
    client, server = bed.pod("client"), bed.pod("server")

    async def test(rig):
        await rig.serve(server)
        pool, key = rig.pool(client), rig.key(client, server)
        (first,) = await asked(pool, key)
        streams = [open_stream(first.tunnel, f"{server.ipv4}:9") for _ in range(3)]
        await until(lambda: all(sink.status == 503 for _, sink in streams))
        held = [open_stream(first.tunnel, f"{server.ipv4}:8080") for _ in range(MAX_STREAMS_OPENED)]
        (second,) = await asked(pool, key)
        assert second.tunnel is not first.tunnel
        for stream, _ in held:
            first.tunnel.connection.reset(stream, 8)
        first.tunnel.loop.flush_soon(first.tunnel)
        (third,) = await asked(pool, key)
        assert third.tunnel is first.tunnel
        pool.close("end of the test")

    child = server.spawn(apps.echo_server, 8080)
    assert child.receive() == "listening"
    proxied(bed, tmp_path, test)


def test_a_tunnel_whose_peer_drains_is_replaced(bed, tmp_path):
    client, server = bed.pod("client"), bed.pod("server")

    async def test(rig):
        await rig.serve(server)
        pool, key = rig.pool(client), rig.key(client, server)
        (first,) = await asked(pool, key)
        await rig.pods.drain(server.name, 0)
        await first.tunnel.closed.wait()
        await rig.pods.remove(server.name)
        await rig.serve(server)
        (second,) = await asked(pool, key)
        assert second.tunnel is not first.tunnel
        pool.close("end of the test")

    proxied(bed, tmp_path, test)


def test_an_idle_tunnel_is_released(bed, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "_IDLE_CHECK", 0.02)
    monkeypatch.setattr(pool_module, "POOL_IDLE_TIMEOUT", 0.1)
    client, server = bed.pod("client"), bed.pod("server")

    async def test(rig):
        await rig.serve(server)
        pool = rig.pool(client)
        rig.nursery.start_soon(pool.release_idle)
        (one,) = await asked(pool, rig.key(client, server))
        await one.tunnel.closed.wait()
        assert one.tunnel.reason == "drained"

    proxied(bed, tmp_path, test)


def test_a_next_hop_that_does_not_answer_says_what_to_check(bed, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "CONNECT_TIMEOUT", 0.3)
    client, server = bed.pod("client"), bed.pod("server")
    port = str(HBONE_PORT)
    server.command("iptables", "-A", "INPUT", "-p", "tcp", "--dport", port, "-j", "DROP")

    async def test(rig):
        (one,) = await asked(rig.pool(client), rig.key(client, server))
        assert one.failure.startswith(
            "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: "
            f"no answer from {server.ipv4}:15008 in 0.3 s"
        )

    proxied(bed, tmp_path, test)


def test_a_peer_that_accepts_and_says_nothing_does_not_hold_up_for_ever(bed, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "HANDSHAKE_TIMEOUT", 0.3)
    client, server = bed.pod("client"), bed.pod("server")
    child = server.spawn(apps.echo_server, HBONE_PORT, at_eof=True)
    assert child.receive() == "listening"

    async def test(rig):
        (one,) = await asked(rig.pool(client), rig.key(client, server))
        assert one.failure == f"no TLS and HTTP/2 answer from {server.ipv4}:15008 in 0.3 s"

    proxied(bed, tmp_path, test)


def saturate(tunnel):
    tunnel._count_bulk(64 << 20)


def test_a_connection_does_not_join_a_tunnel_that_is_saturated_by_bulk(bed, tmp_path):
    """It gets another tunnel, up to four of them, and the first again when the bulk is over."""
    client, server = bed.pod("client"), bed.pod("server")

    async def test(rig):
        await rig.serve(server)
        pool, key = rig.pool(client), rig.key(client, server)
        tunnels = []
        for _ in range(6):
            for tunnel in tunnels:
                saturate(tunnel)
            (one,) = await asked(pool, key)
            tunnels.append(one.tunnel)
        assert len(set(tunnels)) == 4
        for tunnel in tunnels:
            tunnel._bulk_at -= 1.0
        (one,) = await asked(pool, key)
        assert one.tunnel is tunnels[0]
        pool.close("end of the test")

    proxied(bed, tmp_path, test)


def test_a_saturated_tunnel_is_better_than_none(bed, tmp_path):
    """When no other can be opened beside it, it takes the connection."""
    client, server = bed.pod("client"), bed.pod("server")

    async def test(rig):
        await rig.serve(server)
        pool, key = rig.pool(client), rig.key(client, server)
        (one,) = await asked(pool, key)
        rig.pods._pods["server"]._stop_listening()
        saturate(one.tunnel)
        (other,) = await asked(pool, key)
        assert other.tunnel is one.tunnel
        pool.close("end of the test")

    proxied(bed, tmp_path, test)


@pytest.mark.parametrize("drained", ["client", "server"])
def test_a_pod_is_drained_when_its_tunnels_are_over(bed, tmp_path, drained):
    """Its last connection may have ended with bytes still in the tunnel, or with the kernel."""
    client, server = bed.pod("client"), bed.pod("server")

    async def test(rig):
        await rig.serve(client)
        await rig.serve(server)
        pods = rig.pods._pods
        pool = pods["client"]._pool
        (one,) = await asked(pool, rig.key(client, server))
        await until(lambda: pods["server"]._inbound._tunnels)
        (inbound,) = pods["server"]._inbound._tunnels
        assert await rig.pods.drain(drained, 10) == 0
        tunnel = one.tunnel if drained == "client" else inbound.tunnel
        assert tunnel.over.is_set()

    proxied(bed, tmp_path, test)
