"""`verify` passes for a captured pod, and for no other."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pyambient.agent.verify import Check, verify
from pyambient.intercept.node_pins import detach_pinned, node_map, pod_directory
from pyambient.model.numbers import INBOUND_PORT
from tests.bed import BedPod, CgroupTree, Channel, Child

from .rig import Rig

_BPFFS = Path("/sys/fs/bpf/pyambient")
_IPV4, _IPV6 = "IPv4", "IPv6"
_STEP = "a step of the enrolment is in place"
_LISTENERS = "the listeners in the pod are the proxy's"


def _tcp(family: str) -> str:
    return f"an {family} connection of an app reaches the proxy"


def _dns(kind: str, family: str) -> str:
    return f"DNS over {kind} of an app reaches the proxy by {family}"


def _inbound(family: str) -> str:
    return f"an {family} connection from outside reaches the proxy"


def _hbone(family: str) -> str:
    return f"an {family} connection from outside to port 15008 is the proxy's"


def _outbound(family: str) -> set[str]:
    return {_tcp(family), _dns("UDP", family), _dns("TCP", family)}


def _trials(family: str) -> set[str]:
    """What is tried in a pod that captures all it can."""
    return _outbound(family) | {_inbound(family), _hbone(family)}


@pytest.fixture
def agent(rig: Rig) -> Child:
    return rig.start_agent()


@pytest.fixture
def proxy(rig: Rig, agent: Child) -> Child:
    return rig.start_proxy()


def _checks(rig: Rig, pod: BedPod) -> list[Check]:
    return [Check(**check) for check in rig.ask("verify", netns=pod.path)]


def _failures(checks: list[Check]) -> dict[str, str]:
    """{what was checked: what is wrong}, of the checks that failed."""
    assert all(check.then for check in checks if check.problem), checks
    return {check.what: check.problem for check in checks if check.problem}


def _failures_without_agent(rig: Rig, pod: BedPod, proxy: Child) -> dict[str, str]:
    """What an agent would repair meanwhile."""
    return _failures(verify(rig.records()[pod.name], pod.netns, [proxy.pid]))


@pytest.mark.parametrize("families", [(_IPV4, _IPV6), (_IPV4,), (_IPV6,)], ids="-".join)
def test_a_captured_pod_passes(
    rig: Rig, proxy: Child, backend: str, families: tuple[str, ...]
) -> None:
    """All that the pod's families allow is tried, and nothing else."""
    pod = rig.bed.pod("one", ipv4=_IPV4 in families, ipv6=_IPV6 in families)
    rig.enroll(pod, backend)
    checks = _checks(rig, pod)
    assert _failures(checks) == {}
    tried = {check.what for check in checks if _IPV4 in check.what or _IPV6 in check.what}
    assert tried == set().union(*(_trials(family) for family in families))


def _in_pod(*lines: str) -> Callable[[Rig, BedPod], None]:
    def damage(_: Rig, pod: BedPod) -> None:
        for line in lines:
            pod.command(*line.split())

    return damage


def _unpin_of_node(*names: str) -> Callable[[Rig, BedPod], None]:
    def damage(_: Rig, __: BedPod) -> None:
        for name in names:
            detach_pinned(_BPFFS / "node" / name)

    return damage


def _unpin_of_pod(name: str) -> Callable[[Rig, BedPod], None]:
    def damage(rig: Rig, pod: BedPod) -> None:
        pin = pod_directory(_BPFFS, rig.records()[pod.name].pod.uid) / name
        assert pin.exists()
        detach_pinned(pin)

    return damage


def _forget(name: str) -> Callable[[Rig, BedPod], None]:
    """Take this pod's entries out of a map of the node."""

    def damage(_: Rig, pod: BedPod) -> None:
        entries = node_map(_BPFFS, name)
        assert entries is not None
        cookie = pod.netns.cookie().to_bytes(8, "little")
        with entries:
            found = [key for key in entries.keys() if key.startswith(cookie)]  # noqa: SIM118 - no dict
            assert found
            for key in found:
                entries.delete(key)

    return damage


_FAMILIES = (_IPV4, _IPV6)
_TCP, _PLAIN, _HBONE = (set(map(check, _FAMILIES)) for check in (_tcp, _inbound, _hbone))
_OVER_TCP = _TCP | {_dns("TCP", family) for family in _FAMILIES}


class _Sabotage(NamedTuple):
    """What fails for it, and a word of the reason; the node's own programs serve other pods too."""

    backend: str
    damage: Callable[[Rig, BedPod], None]
    fails: set[str]
    reason: str
    of_node: bool = False


_SABOTAGE = {
    "bpf-no-rule": _Sabotage(
        "bpf",
        _in_pod("ip rule del pref 32764", "ip rule del pref 32765"),
        {_tcp(_IPV4), _dns("TCP", _IPV4)},
        "",
    ),
    "bpf-no-connect-hook": _Sabotage(
        "bpf",
        _unpin_of_node("connect4"),
        {_tcp(_IPV4), _dns("TCP", _IPV4)},
        "",
        of_node=True,
    ),
    "bpf-no-dns-hook": _Sabotage(
        "bpf",
        _unpin_of_node("dns_conn4", "dns_send4"),
        {_dns("UDP", _IPV4)},
        "nobody has answered a query to 192.0.2.1:53",
        of_node=True,
    ),
    "bpf-no-dns-gate": _Sabotage(
        "bpf",
        _forget("dns_pods"),
        {_dns(kind, family) for kind in ("UDP", "TCP") for family in _FAMILIES},
        "192.0.2.1 left the pod by eth0",
    ),
    "bpf-no-sk-lookup": _Sabotage("bpf", _unpin_of_pod("sk_lookup"), _OVER_TCP | _PLAIN, ""),
    "bpf-no-listeners": _Sabotage(
        "bpf", _forget("listeners"), _OVER_TCP | _PLAIN | _HBONE, "refused"
    ),
    "tc-no-sk-lookup": _Sabotage(
        "tc",
        _unpin_of_pod("sk_lookup"),
        _OVER_TCP | _PLAIN,
        "",
    ),
    "tc-no-gate": _Sabotage("tc", _forget("pods"), _OVER_TCP, "left the pod unseen"),
    "nftables-no-outbound": _Sabotage(
        "nftables",
        _in_pod("nft flush chain ip pyambient outbound"),
        _outbound(_IPV4),
        "192.0.2.1 left the pod by eth0",
    ),
    "nftables-no-inbound": _Sabotage(
        "nftables",
        _in_pod("nft flush chain ip6 pyambient inbound"),
        {_inbound(_IPV6)},
        "past the proxy",
    ),
    "iptables-no-outbound": _Sabotage(
        "iptables",
        _in_pod("iptables -t nat -F ISTIO_OUTPUT"),
        _outbound(_IPV4),
        "192.0.2.1 left the pod by eth0",
    ),
    "iptables-no-inbound": _Sabotage(
        "iptables",
        _in_pod("iptables -t nat -F ISTIO_PRERT"),
        {_inbound(_IPV4)},
        "past the proxy",
    ),
}


@pytest.mark.parametrize("case", _SABOTAGE)
def test_what_is_broken_on_purpose_is_found(
    rig: Rig, agent: Child, proxy: Child, case: str
) -> None:
    """What is missing is named, what it lets through is proven, the rest and the other pod pass."""
    sabotage = _SABOTAGE[case]
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    for pod in (one, two):
        rig.enroll(pod, sabotage.backend)
    agent.kill()
    sabotage.damage(rig, one)
    found = _failures_without_agent(rig, one, proxy)
    assert found.pop(_STEP)
    assert set(found) == sabotage.fails
    assert any(sabotage.reason in problem for problem in found.values()), found
    if not sabotage.of_node:
        assert _failures_without_agent(rig, two, proxy) == {}


def test_a_failure_says_where_it_went_and_what_to_do(rig: Rig, agent: Child, proxy: Child) -> None:
    """A lost redirect, seen before anybody has repaired it."""
    pod = rig.bed.pod("one")
    rig.enroll(pod, "nftables")
    agent.kill()
    _in_pod("nft flush chain ip pyambient inbound")(rig, pod)
    checks = verify(rig.records()[pod.name], pod.netns, [proxy.pid])
    (broken,) = (check for check in checks if check.what == _inbound(_IPV4))
    assert "10.77.0.2:9 went to port 9, past the proxy" in broken.problem
    assert "unenroll" in broken.then


def test_a_dead_proxy_is_noticed(rig: Rig, proxy: Child, backend: str) -> None:
    """Without listeners a connection is refused, which is safe, but no capture."""
    pod = rig.bed.pod("one")
    rig.enroll(pod, backend)
    proxy.kill()
    rig.wait_for_proxies(0)
    checks = _checks(rig, pod)
    found = _failures(checks)
    assert set(found) == {
        _LISTENERS,
        *(what for family in _FAMILIES for what in _trials(family)),
    }
    assert "refused" in found[_tcp(_IPV4)]
    assert all("status" in check.then for check in checks if check.problem and _IPV4 in check.what)


def _listen(channel: Channel, port: int) -> None:
    how = {"family": socket.AF_INET6, "dualstack_ipv6": True, "reuse_port": True}
    with socket.create_server(("::", port), **how):
        channel.send("listening")
        channel.receive()


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_who_shares_a_port_with_the_proxy_is_noticed(rig: Rig, proxy: Child, backend: str) -> None:
    """With netfilter root gets a share of what is redirected there."""
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    for pod in (one, two):
        rig.enroll(pod, backend)
    with one.spawn(_listen, INBOUND_PORT, uid=0, gid=0) as app:
        assert app.receive() == "listening"
        noticed = _failures(_checks(rig, one))
        assert noticed[_LISTENERS] == f"somebody else listens on {INBOUND_PORT}"
        assert _failures(_checks(rig, two)) == {}


def test_the_probe_leaves_no_cgroup(rig: Rig, proxy: Child, cgroup_tree: CgroupTree) -> None:
    """It runs in a cgroup of its own below the apps', for as long as it takes."""
    pod = rig.bed.pod("one")
    rig.enroll(pod)
    before = set(cgroup_tree.directories())
    assert _failures(_checks(rig, pod)) == {}
    assert set(cgroup_tree.directories()) == before


def test_what_is_excluded_is_not_tried(rig: Rig, proxy: Child, backend: str) -> None:
    """A pod that leaves out the addresses that are tried is not blamed for it."""
    pod = rig.bed.pod("one")
    rig.enroll(pod, backend)
    chosen: dict[str, Any] = {
        "outbound": {"include_cidrs": "2001:db8::/32"},
        "inbound": {"exclude_ports": "9"},
    }
    rig.ask("set", netns=pod.path, options=chosen)
    checks = _checks(rig, pod)
    assert _failures(checks) == {}
    what = [check.what for check in checks]
    assert "192.0.2.1:9 is excluded, so IPv4 was not tried" in what
    assert "what comes from 192.0.2.1 to 10.77.0.2:9 is excluded, so it was not tried" in what
    assert _tcp(_IPV6) in what
    assert not {_tcp(_IPV4), _inbound(_IPV4), _inbound(_IPV6)} & set(what)


def test_what_the_pod_does_not_capture_is_said(rig: Rig, proxy: Child, backend: str) -> None:
    """DNS and plain inbound that were left out at enrolment are named, and nobody is blamed."""
    pod = rig.bed.pod("one")
    rig.enroll(pod, backend)
    rig.ask("set", netns=pod.path, options={"dns": False, "bypass_inbound": True})
    checks = _checks(rig, pod)
    assert _failures(checks) == {}
    what = [check.what for check in checks]
    assert "DNS is not captured, as the pod's options say, and was not tried" in what
    assert "inbound capture is bypassed, so plain IPv4 was not tried" in what
    assert not {_dns("UDP", _IPV4), _dns("TCP", _IPV4), _inbound(_IPV4)} & set(what)


def test_a_query_that_others_answer_is_no_proof(rig: Rig, agent: Child, proxy: Child) -> None:
    """A network that answers whatever goes to port 53 is seen through: the query left the pod."""
    pod = rig.bed.pod("one")
    rig.enroll(pod, "nftables")
    agent.kill()
    rig.bed.node.command("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
    try:
        with rig.bed.node.spawn(_answer_all, uid=0, gid=0) as hijacker:
            assert hijacker.receive() == "listening"
            _in_pod("nft flush chain ip pyambient outbound")(rig, pod)
            found = _failures_without_agent(rig, pod, proxy)
    finally:
        rig.bed.node.command("ip", "addr", "del", "192.0.2.1/32", "dev", "lo")
    assert "left the pod by eth0" in found[_dns("UDP", _IPV4)]


def _answer_all(channel: Channel) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
        resolver.bind(("192.0.2.1", 53))
        channel.send("listening")
        while True:
            query, peer = resolver.recvfrom(512)
            resolver.sendto(query[:2] + bytes((0x80, 1)) + bytes(8), peer)
