"""What may arrive at a pod, by tunnel and in plaintext: one row per rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyambient.mesh.inbound import (
    Accept,
    Entrance,
    Reject,
    decide_inbound,
    decide_plaintext,
)
from pyambient.mesh.snapshot import Snapshot
from pyambient.model.address import SocketAddress
from pyambient.model.policy import Action, Match, MatchKind, StringMatch
from pyambient.model.workload import ApplicationTunnel, TunnelledProtocol
from tests.mesh.build import PEER, behind, policy, service, spiffe, workload

WEB = service("web", ports={80: 8080, 81: 0, 82: 15006})
ADMIN = service("admin", ports={443: 0})
ELSEWHERE = service("web", namespace="other", hostname="web.other", ports={90: 9000})
SERVER = workload(
    "server",
    "10.0.0.2",
    "fd00::2",
    services={WEB.key: {81: 8181}, ADMIN.key: {443: 8443}},
)
MESH = Snapshot([SERVER], [WEB, ADMIN, ELSEWHERE])
CLIENT = spiffe("client")
HOST = WEB.hostname
SELF_CALL = "attempted recursive call to ourselves"


def arrive(authority, own=SERVER, mesh=MESH, local_ip="10.0.0.2", **more):
    return decide_inbound(authority, Entrance(local_ip), own, mesh, PEER, CLIENT, **more)


@pytest.mark.parametrize(
    ("authority", "local_ip", "target"),
    [
        ("10.0.0.2:8080", "10.0.0.2", SocketAddress("10.0.0.2", 8080)),
        ("10.0.0.2:22", "10.0.0.2", SocketAddress("10.0.0.2", 22)),
        ("[fd00::2]:8080", "fd00::2", SocketAddress("fd00::2", 8080)),
        ("[FD00:0::2]:8080", "fd00::2", SocketAddress("fd00::2", 8080)),
        ("[::ffff:10.0.0.2]:8080", "10.0.0.2", SocketAddress("10.0.0.2", 8080)),
        ("[fe80::2]:8080", "fe80::2%3", SocketAddress("fe80::2%3", 8080)),
        ("[fe80::2%3]:8080", "fe80::2%3", SocketAddress("fe80::2%3", 8080)),
        (f"{HOST}:80", "10.0.0.2", SocketAddress("10.0.0.2", 8080)),
        (f"{HOST.upper()}:80", "10.0.0.2", SocketAddress("10.0.0.2", 8080)),
        (f"{HOST}:81", "fd00::2", SocketAddress("fd00::2", 8181)),
        ("web.other:90", "10.0.0.2", SocketAddress("10.0.0.2", 9000)),
    ],
)
def test_accepted(authority, local_ip, target):
    """The pod's own address is the target, at the port that the authority means."""
    decided = arrive(authority, local_ip=local_ip)
    assert isinstance(decided, Accept)
    assert decided.target == target
    assert (decided.facts.source, decided.facts.identity) == (PEER, CLIENT)
    assert decided.facts.destination == target


@pytest.mark.parametrize(
    ("authority", "status", "reason"),
    [
        ("10.0.0.3:8080", 400, "ip mismatch: 10.0.0.2 != 10.0.0.3"),
        ("127.0.0.1:8080", 400, "ip mismatch: 10.0.0.2 != 127.0.0.1"),
        ("[fd00::2]:8080", 400, "ip mismatch: 10.0.0.2 != fd00::2"),
        ("10.0.0.2", 400, "invalid CONNECT address '10.0.0.2'"),
        ("", 400, "invalid CONNECT address ''"),
        ("10.0.0.2:99999", 400, "invalid CONNECT address '10.0.0.2:99999'"),
        ("x\n:80", 400, r"invalid CONNECT address 'x\n:80'"),
        ("y" * 5000, 400, f"invalid CONNECT address '{'y' * 80}'"),
        ("10.0.0.2:15001", 503, SELF_CALL),
        ("10.0.0.2:15006", 503, SELF_CALL),
        ("10.0.0.2:15008", 503, SELF_CALL),
        (f"{HOST}:82", 503, SELF_CALL),
        ("nowhere.example:80", 503, "no service or workload for hostname: nowhere.example"),
        (f"{HOST}:99", 503, f"requested service {HOST}:99 found, but cannot resolve port"),
    ],
)
def test_rejected(authority, status, reason):
    """Anything else than the pod itself, unreadable authorities and our own ports are refused."""
    decided = arrive(authority)
    assert decided == Reject(status, reason)
    assert decided.why == reason


def test_unknown_pod():
    """While the pod's workload is unknown there is nothing to judge by."""
    reason = "failed to fetch information about local workload"
    assert arrive("10.0.0.2:80", own=None) == Reject(503, reason)
    assert arrive("nonsense", own=None).status == 400


def test_application_tunnel():
    """A pod whose application wants a PROXY header gets no connection without one."""
    tunnel = ApplicationTunnel(TunnelledProtocol.PROXY, 15088)
    own = workload("server", "10.0.0.2", application_tunnel=tunnel)
    decided = arrive("10.0.0.2:80", own=own)
    assert decided == Reject(
        503, "unsupported feature: application tunnel of workload default/server"
    )


@pytest.mark.parametrize(
    ("authority", "host", "expected"),
    [
        ("10.0.0.2:8080", None, WEB),
        ("10.0.0.2:8181", None, WEB),
        ("10.0.0.2:8443", None, ADMIN),
        ("10.0.0.2:8443", HOST, WEB),
        ("10.0.0.2:8080", "web.other", WEB),
        ("10.0.0.2:22", None, None),
        ("web.other:90", None, ELSEWHERE),
        (f"{HOST}:80", ADMIN.hostname, WEB),
    ],
)
def test_service(authority, host, expected):
    """The service is the one asked for by name, else the one the client names, else by port."""
    assert arrive(authority, host=host).service is expected


def guarded(*policies, **fields):
    own = workload("server", "10.0.0.2", **fields)
    return own, Snapshot([own], [WEB], policies)


ONLY_CLIENT = policy(
    "only-client",
    Match(principals=(StringMatch(MatchKind.EXACT, CLIENT.principal),), destination_ports=(8080,)),
)
DENY_ALL = policy("none", Match(not_destination_ports=(1,)), action=Action.DENY)


def test_policy_allows():
    """A policy sees the real port and the client's identity."""
    own, mesh = guarded(ONLY_CLIENT)
    decided = arrive("10.0.0.2:8080", own, mesh)
    assert isinstance(decided, Accept)
    assert decided.why == "allowed by: default/only-client"


@pytest.mark.parametrize(
    ("policies", "authority", "reason"),
    [
        ([DENY_ALL], "10.0.0.2:8080", "explicitly denied by: default/none"),
        ([ONLY_CLIENT], "10.0.0.2:22", "allow policies exist, but none allowed"),
        ([ONLY_CLIENT, DENY_ALL], "10.0.0.2:8080", "explicitly denied by: default/none"),
    ],
)
def test_policy_refuses(policies, authority, reason):
    """A policy's refusal is a 401, with ztunnel's words."""
    own, mesh = guarded(*policies)
    expected = Reject(401, f"connection closed due to policy rejection: {reason}")
    assert arrive(authority, own, mesh) == expected


def test_loop_before_policy():
    """A loop is a loop for everyone, whatever policies say."""
    own, mesh = guarded(DENY_ALL)
    assert arrive("10.0.0.2:15008", own, mesh) == Reject(503, SELF_CALL)


def test_notes():
    """What a dry run would do and what is skipped stands in the explanation."""
    trial = policy("trial", Match(not_destination_ports=(1,)), dry_run=True)
    own, mesh = guarded(trial, policies=("default/gone",))
    assert arrive("10.0.0.2:80", own, mesh).why == (
        "no allow policy applies; dry-run: allow policy default/trial matches; "
        "policy default/gone is not defined and was skipped"
    )


@given(st.text(max_size=60))
def test_any_authority(authority):
    """No authority is accepted but the pod's own, and none raises."""
    decided = arrive(authority)
    assert isinstance(decided, (Accept, Reject))
    if isinstance(decided, Accept):
        assert decided.target.ip == "10.0.0.2"


OWN = ("10.0.0.2", "fd00::2", "127.0.0.1", "::1")


def plaintext(ip, port, own=SERVER, mesh=MESH):
    return decide_plaintext(SocketAddress(ip, port), OWN, own, mesh, PEER)


@pytest.mark.parametrize("ip", ["10.0.0.2", "fd00::2"])
def test_plaintext_accepted(ip):
    """Plaintext to an address of the pod goes on to just there, without identity."""
    decided = plaintext(ip, 8080)
    assert isinstance(decided, Accept)
    assert decided.target == SocketAddress(ip, 8080)
    assert decided.service is WEB
    assert decided.facts.identity is None


@pytest.mark.parametrize(
    ("ip", "port", "status", "reason"),
    [
        ("10.0.0.2", 15001, 503, SELF_CALL),
        ("10.0.0.2", 15006, 503, SELF_CALL),
        ("10.0.0.2", 15008, 503, SELF_CALL),
        ("10.0.0.3", 80, 400, "destination 10.0.0.3:80 is not an address of this pod"),
        (
            "169.254.169.254",
            80,
            400,
            "destination 169.254.169.254:80 is not an address of this pod",
        ),
        ("127.0.0.1", 80, 400, "destination 127.0.0.1:80 is not an address of this pod"),
        ("::1", 80, 400, "destination [::1]:80 is not an address of this pod"),
    ],
)
def test_plaintext_rejected(ip, port, status, reason):
    """Our own ports and every address that is not the pod's are refused; loopback is no one's."""
    assert plaintext(ip, port) == Reject(status, reason)


def test_plaintext_to_unknown_pod():
    """While the pod's workload is unknown there are no policies to ask."""
    assert plaintext("10.0.0.2", 80, own=None).status == 503


def test_plaintext_policy():
    """A policy that wants an identity refuses plaintext."""
    own, mesh = guarded(ONLY_CLIENT)
    decided = plaintext("10.0.0.2", 8080, own, mesh)
    assert decided.status == 401
    assert decided.reason.endswith("allow policies exist, but none allowed")


def test_plaintext_service():
    """A pod's own port map tells which service a plaintext connection is for."""
    own = workload("a", "10.0.0.2", services=behind(WEB, ports={80: 7000}))
    mesh = Snapshot([own], [WEB])
    assert plaintext("10.0.0.2", 7000, own, mesh).service is WEB
    assert plaintext("10.0.0.2", 8080, own, mesh).service is None
