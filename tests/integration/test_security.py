"""What an enrolled pod refuses: each attack is answered as it should be, logged, and stays out.

The attacker sits in a pod outside the mesh and talks to port 15008 of the server's pod, which is
not intercepted, so the backend does not matter except where a test says so.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import HBONE_PORT, INBOUND_PORT
from pyambient.model.ports import WELL_KNOWN
from tests.bed import Child, ClientOptions, apps

from . import attacker
from .attacker import connect_headers
from .conftest import Pair

pytestmark = pytest.mark.parametrize("backend", ["bpf"], scope="module")

FRIEND = "spiffe://cluster.local/ns/default/sa/friend"
APP_PORT = 8090


@pytest.fixture
def app(pair: Pair) -> Iterator[Child]:
    """The server's app, which must not be reached by any of this."""
    with pair.serve(pair.server, APP_PORT) as server:
        yield server


@pytest.fixture
def hbone(pair: Pair, family: str) -> SocketAddress:
    return SocketAddress(pair.server.address(family), HBONE_PORT)


@pytest.fixture
def target(pair: Pair, family: str) -> str:
    """The CONNECT authority of the app."""
    return str(SocketAddress(pair.server.address(family), APP_PORT))


def assert_refused(pair: Pair, app: Child, hbone: SocketAddress, error: str) -> None:
    """The refusal is in the log, with a reason, and no connection came to the app."""
    wanted = {"scope": "access", "direction": "inbound", "dst.addr": str(hbone)}
    pair.mesh.wait_until(
        lambda: any(
            wanted.items() <= line.items() and error in str(line.get("error"))
            for line in pair.mesh.lines()
        ),
        f"access log line about {hbone} with error {error!r}",
        timeout=5,
    )
    assert app.ask("accepted") == []


def test_without_a_certificate_the_handshake_ends_in_an_alert(pair, app, hbone, target):
    """RFC 8446 section 4.4.2.4: certificate_required."""
    credentials = attacker.issue(pair.mesh.ca_dir, FRIEND)
    anonymous = attacker.Credentials(b"", b"", credentials.root)
    outcome = pair.outside.run(attacker.attack, hbone, anonymous, connect_headers(target))
    assert "certificate required" in outcome.tls_error.lower()
    assert outcome.statuses == []
    assert_refused(pair, app, hbone, "peer did not return a certificate")


@pytest.mark.parametrize(
    ("issuer", "alert"), [("elsewhere.example", "unknown ca"), ("cluster.local", "decrypt error")]
)
def test_a_certificate_of_another_ca_ends_in_an_alert(pair, app, hbone, target, issuer, alert):
    """RFC 8446 section 6.2; a CA that only has our CA's name is found out by its signature."""
    stranger = attacker.other_authority(FRIEND, issuer)
    ours = attacker.issue(pair.mesh.ca_dir, FRIEND)
    credentials = attacker.Credentials(stranger.chain, stranger.key, ours.root)
    outcome = pair.outside.run(attacker.attack, hbone, credentials, connect_headers(target))
    assert alert in outcome.tls_error.lower()
    assert outcome.statuses == []
    assert_refused(pair, app, hbone, "certificate verify failed")


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("spiffe://elsewhere.example/ns/default/sa/friend", "outside trust domain"),
        ("spiffe://cluster.local/workload/friend", "has no SPIFFE id"),
        (None, "has no SPIFFE id"),
    ],
)
def test_an_identity_of_no_use_is_closed_before_any_request_is_answered(
    pair, app, hbone, target, uri, error
):
    """Not even SETTINGS: the peer learns nothing but that the connection is over."""
    credentials = attacker.issue(pair.mesh.ca_dir, uri)
    outcome = pair.outside.run(attacker.attack, hbone, credentials, connect_headers(target))
    assert (outcome.statuses, outcome.frames) == ([], 0)
    assert outcome.closed or outcome.tls_error
    assert_refused(pair, app, hbone, error)


def test_a_friend_gets_through_so_the_refusals_mean_something(pair, app, hbone, target):
    """The same client with a certificate of the mesh reaches the app."""
    credentials = attacker.issue(pair.mesh.ca_dir, FRIEND)
    outcome = pair.outside.run(attacker.attack, hbone, credentials, connect_headers(target))
    assert outcome.statuses == [200]
    assert len(app.ask("accepted")) == 1


def test_requests_that_are_no_connect_to_this_pod_get_400(pair, app, hbone, target):
    """GET, CONNECT with a path, no authority, one that cannot be parsed, another pod's address."""
    credentials = attacker.issue(pair.mesh.ca_dir, FRIEND)
    elsewhere = str(SocketAddress(pair.client.address("v4"), APP_PORT))
    requests = [
        [(":method", "GET"), (":scheme", "https"), (":authority", target), (":path", "/")],
        [*connect_headers(target), (":scheme", "https"), (":path", "/")],
        [(":method", "CONNECT")],
        connect_headers("no port here"),
        connect_headers("10.77.0.999:80"),
        connect_headers(elsewhere),
    ]
    outcome = pair.outside.run(attacker.attack, hbone, credentials, *requests)
    assert outcome.statuses == [400] * len(requests)
    assert_refused(pair, app, hbone, "ip mismatch")


@pytest.mark.parametrize("port", WELL_KNOWN.loops)
def test_the_proxys_own_ports_are_no_target(pair, app, hbone, family, port):
    """The proxy would call itself: 503."""
    credentials = attacker.issue(pair.mesh.ca_dir, FRIEND)
    authority = str(SocketAddress(pair.server.address(family), port))
    outcome = pair.outside.run(attacker.attack, hbone, credentials, connect_headers(authority))
    assert outcome.statuses == [503]
    assert_refused(pair, app, hbone, "attempted recursive call to ourselves")


def test_a_port_without_an_app_gets_503(pair, app, hbone, family):
    credentials = attacker.issue(pair.mesh.ca_dir, FRIEND)
    authority = str(SocketAddress(pair.server.address(family), 9))
    outcome = pair.outside.run(attacker.attack, hbone, credentials, connect_headers(authority))
    assert outcome.statuses == [503]
    assert_refused(pair, app, hbone, "Connection refused")


def test_a_client_that_resumes_sessions_is_checked_in_full_each_time(pair, app, hbone, target):
    """PyOpenSSL skips the verify callback on a resumed session: there must be none."""
    credentials = attacker.issue(pair.mesh.ca_dir, FRIEND)
    outcomes = pair.outside.run(attacker.resume, hbone, credentials, target)
    assert [outcome.data for outcome in outcomes] == [b"resumed?"] * 2
    assert [outcome.resumed for outcome in outcomes] == [False, False]


def test_a_refused_client_that_resumes_is_refused_each_time(pair, app, hbone, target):
    credentials = attacker.issue(pair.mesh.ca_dir, "spiffe://elsewhere.example/ns/a/sa/b")
    outcomes = pair.outside.run(attacker.resume, hbone, credentials, target)
    assert [(outcome.statuses, outcome.frames) for outcome in outcomes] == [([], 0)] * 2
    assert_refused(pair, app, hbone, "outside trust domain")


def test_port_15006_reached_by_an_apps_own_nat_is_refused(pair, family):
    """The proxy must not connect for an app to where the app could not go itself."""
    server, outside = pair.server, pair.outside
    tool, elsewhere, length = (
        ("iptables", "10.99.0.1", 32) if family == "v4" else ("ip6tables", "fd99::1", 128)
    )
    outside.ip(f"route add {elsewhere}/{length} via {server.address(family)}")
    rule = ("PREROUTING", "-d", f"{elsewhere}/{length}", "-p", "tcp", "-j", "REDIRECT")
    server.command(tool, "-w", "-t", "nat", "-A", *rule, "--to-ports", str(INBOUND_PORT))
    destination = SocketAddress(elsewhere, 80)
    seen = outside.run(apps.request, destination, options=ClientOptions(timeout=5))
    server.command(tool, "-w", "-t", "nat", "-D", *rule, "--to-ports", str(INBOUND_PORT))
    outside.ip(f"route del {elsewhere}/{length}")
    assert (seen.data, seen.errno) == (b"", errno.ECONNRESET)
    ours = str(SocketAddress(server.address(family), INBOUND_PORT))
    (line,) = pair.mesh.access_log({"direction": "inbound", "dst.addr": ours})
    assert line["error"] == "attempted recursive call to ourselves"
    for table in ("ip nat", "ip6 nat"):
        server.run(_delete_table, table, uid=0, gid=0)


def _delete_table(table: str) -> None:
    import subprocess

    subprocess.run(["nft", "delete", "table", *table.split()], check=False, capture_output=True)
