"""Golden lines of the access log, plain and JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.spiffe import SpiffeId
from pyambient.model.workload import Workload
from pyambient.observe.accesslog import AccessLog, ConnectionRecord


def workload(name: str, namespace: str = "default", cluster: str = "Kubernetes") -> Workload:
    return Workload(f"uid-{name}", name, namespace, name, "cluster.local", cluster_id=cluster)


def hbone() -> ConnectionRecord:
    """A connection through a tunnel, as the client's proxy sees it."""
    client, server = workload("client"), workload("server")
    return ConnectionRecord(
        direction="outbound",
        source=SocketAddress("10.10.1.2", 40000),
        source_workload=client,
        source_identity=client.identity,
        destination=SocketAddress("10.10.2.2", 15008),
        hbone_authority="10.10.2.2:8080",
        destination_service="server.default.svc.cluster.local",
        destination_workload=server,
        destination_identity=server.identity,
        bytes_sent=84,
        bytes_received=165,
        started=100.0,
    )


def hbone_v6() -> ConnectionRecord:
    """The same over IPv6, as the server's proxy sees it."""
    return replace(
        hbone(),
        direction="inbound",
        source=SocketAddress("fd00:10:10:1::2", 40000),
        destination=SocketAddress("fd00:10:10:2::2", 15008),
        hbone_authority="[fd00:10:10:2::2]:8080",
        destination_service=None,
    )


def passthrough() -> ConnectionRecord:
    """A connection out of the mesh: nothing is known of the other end, nothing was proved."""
    return ConnectionRecord(
        direction="outbound",
        source=SocketAddress("10.10.1.2", 40001),
        source_workload=workload("client", cluster=""),
        destination=SocketAddress("1.2.3.4", 443),
        started=100.0,
    )


def plaintext_inbound() -> ConnectionRecord:
    """A client outside of the mesh reaches a pod in plaintext."""
    return ConnectionRecord(
        direction="inbound",
        source=SocketAddress("192.0.2.9", 51000),
        destination=SocketAddress("10.10.2.2", 8080),
        destination_workload=workload("server", "shop"),
        bytes_sent=9603,
        bytes_received=2052,
        started=97.8896,
    )


def timed_out() -> ConnectionRecord:
    """A tunnel that did not come about."""
    return replace(
        hbone(),
        destination_service=None,
        destination_identity=None,
        bytes_sent=0,
        bytes_received=0,
        started=89.9983,
        error="connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: "
        "deadline has elapsed",
    )


HBONE_LINE = (
    "info\taccess\tconnection complete\tsrc.addr=10.10.1.2:40000 "
    'src.workload="client" src.namespace="default" '
    'src.identity="spiffe://cluster.local/ns/default/sa/client" src.cluster="Kubernetes" '
    "dst.addr=10.10.2.2:15008 dst.hbone_addr=10.10.2.2:8080 "
    'dst.service="server.default.svc.cluster.local" dst.workload="server" '
    'dst.namespace="default" dst.identity="spiffe://cluster.local/ns/default/sa/server" '
    'dst.cluster="Kubernetes" direction="outbound" bytes_sent=84 bytes_recv=165 '
    'duration="0ms"'
)
HBONE_V6_LINE = (
    "info\taccess\tconnection complete\tsrc.addr=[fd00:10:10:1::2]:40000 "
    'src.workload="client" src.namespace="default" '
    'src.identity="spiffe://cluster.local/ns/default/sa/client" src.cluster="Kubernetes" '
    "dst.addr=[fd00:10:10:2::2]:15008 dst.hbone_addr=[fd00:10:10:2::2]:8080 "
    'dst.workload="server" dst.namespace="default" '
    'dst.identity="spiffe://cluster.local/ns/default/sa/server" dst.cluster="Kubernetes" '
    'direction="inbound" bytes_sent=84 bytes_recv=165 duration="0ms"'
)
PASSTHROUGH_LINE = (
    "info\taccess\tconnection complete\tsrc.addr=10.10.1.2:40001 "
    'src.workload="client" src.namespace="default" dst.addr=1.2.3.4:443 '
    'direction="outbound" bytes_sent=0 bytes_recv=0 duration="0ms"'
)
PLAINTEXT_INBOUND_LINE = (
    "info\taccess\tconnection complete\tsrc.addr=192.0.2.9:51000 "
    'dst.addr=10.10.2.2:8080 dst.workload="server" dst.namespace="shop" '
    'dst.cluster="Kubernetes" direction="inbound" bytes_sent=9603 bytes_recv=2052 '
    'duration="2110ms"'
)
TIMED_OUT_LINE = (
    "error\taccess\tconnection complete\tsrc.addr=10.10.1.2:40000 "
    'src.workload="client" src.namespace="default" '
    'src.identity="spiffe://cluster.local/ns/default/sa/client" src.cluster="Kubernetes" '
    "dst.addr=10.10.2.2:15008 dst.hbone_addr=10.10.2.2:8080 "
    'dst.workload="server" dst.namespace="default" dst.cluster="Kubernetes" '
    'direction="outbound" bytes_sent=0 bytes_recv=0 duration="10001ms" '
    'error="connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: '
    'deadline has elapsed"'
)
GOLDEN = [
    (hbone(), HBONE_LINE),
    (hbone_v6(), HBONE_V6_LINE),
    (passthrough(), PASSTHROUGH_LINE),
    (plaintext_inbound(), PLAINTEXT_INBOUND_LINE),
    (timed_out(), TIMED_OUT_LINE),
]


def plain(record: ConnectionRecord, level: str = "info") -> str:
    """The line of `record` at its end, without the time."""
    lines: list[str] = []
    AccessLog("plain", lines.append, level, clock=lambda: 100.0).complete(record)
    return "".join(lines).partition("\t")[2]


@pytest.mark.parametrize(("record", "golden"), GOLDEN)
def test_plain_lines(record: ConnectionRecord, golden: str) -> None:
    """Field for field what ztunnel writes."""
    assert plain(record) == golden


def test_opened() -> None:
    """At level debug a connection is logged when it opens, without counts or duration."""
    lines: list[str] = []
    AccessLog("plain", lines.append, "debug").opened(hbone())
    rest = lines[0].partition("\t")[2]
    fields = HBONE_LINE.partition("connection complete\t")[2].partition(" bytes_sent")[0]
    assert rest == f"debug\taccess\tconnection opened\t{fields}"


def test_failed() -> None:
    """What is refused before its context exists is a warning with both addresses."""
    lines: list[str] = []
    AccessLog("plain", lines.append).failed(
        SocketAddress("10.0.0.1", 1), SocketAddress("fd00::2", 15008), "inbound", 'no "cert"'
    )
    assert lines[0].partition("\t")[2] == (
        "warn\taccess\tconnection failed\tsrc.addr=10.0.0.1:1 dst.addr=[fd00::2]:15008 "
        'direction="inbound" error="no \\"cert\\""'
    )


def test_json_line() -> None:
    """The same names in the same order, numbers as numbers, all else as strings."""
    lines: list[str] = []
    AccessLog("json", lines.append, clock=lambda: 100.25).complete(
        replace(hbone(), error='closed: "why"')
    )
    assert "\n" not in lines[0]
    found = json.loads(lines[0])
    assert list(found)[:4] == ["level", "time", "scope", "message"]
    del found["time"]
    assert found == {
        "level": "error",
        "scope": "access",
        "message": "connection complete",
        "src.addr": "10.10.1.2:40000",
        "src.workload": "client",
        "src.namespace": "default",
        "src.identity": "spiffe://cluster.local/ns/default/sa/client",
        "src.cluster": "Kubernetes",
        "dst.addr": "10.10.2.2:15008",
        "dst.hbone_addr": "10.10.2.2:8080",
        "dst.service": "server.default.svc.cluster.local",
        "dst.workload": "server",
        "dst.namespace": "default",
        "dst.identity": "spiffe://cluster.local/ns/default/sa/server",
        "dst.cluster": "Kubernetes",
        "direction": "outbound",
        "bytes_sent": 84,
        "bytes_recv": 165,
        "duration": "250ms",
        "error": 'closed: "why"',
    }


@pytest.mark.parametrize("log_format", ["plain", "json"])
@pytest.mark.parametrize(
    "hostile", ['a"\n2026-01-01T00:00:00Z\tinfo\taccess', "\x1b[2J\r", "\u2028"]
)
def test_no_log_injection(log_format: str, hostile: str) -> None:
    """Nothing an app or a peer can choose starts a line, or ends its quotes."""
    lines: list[str] = []
    AccessLog(log_format, lines.append).complete(
        replace(
            hbone(),
            source_workload=replace(workload("client"), name=hostile, namespace=hostile),
            hbone_authority=hostile,
            destination_service=hostile,
            error=hostile,
        )
    )
    (line,) = lines
    assert line.replace("\t", "").isprintable()
    if log_format == "json":
        assert json.loads(line)["dst.hbone_addr"] == hostile
    else:
        assert len(line.split("\t")) == 5
        assert line.replace('\\"', "").count('"') % 2 == 0


@pytest.mark.parametrize(
    ("level", "events"),
    [
        ("debug", ["opened", "complete", "error", "failed"]),
        ("info", ["complete", "error", "failed"]),
        ("warn", ["error", "failed"]),
        ("error", ["error"]),
    ],
)
def test_levels(level: str, events: list[str]) -> None:
    """Each event has ztunnel's level, and is left out above it."""
    lines: list[str] = []
    log = AccessLog("plain", lines.append, level)
    log.opened(hbone())
    log.complete(hbone())
    log.complete(timed_out())
    log.failed(SocketAddress("10.0.0.1", 1), SocketAddress("10.0.0.2", 2), "inbound", "no")
    levels = {"opened": "debug", "complete": "info", "error": "error", "failed": "warn"}
    assert [line.split("\t")[1] for line in lines] == [levels[event] for event in events]


def test_odd_identity_is_quoted() -> None:
    """Identities are strings, whatever the certificate says."""
    record = replace(hbone(), source_identity=SpiffeId("td", "ns-1", "sa.x"))
    assert 'src.identity="spiffe://td/ns/ns-1/sa/sa.x"' in plain(record)
