"""What gets lost of an enrolment is found, put back, logged and counted, while the agent runs."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyambient.intercept.kernel_objects import Map
from pyambient.intercept.node_pins import node_map
from pyambient.model.numbers import DNS_PORT
from tests.bed import BedPod, changes, kernel_state

from .rig import Rig

_BPFFS = Path("/sys/fs/bpf/pyambient")
_Damage = Callable[[Rig, BedPod], None]


def _run(*commands: str) -> _Damage:
    """What somebody with root in the pod does."""

    def damage(_: Rig, pod: BedPod) -> None:
        pod.command("sh", "-ec", "; ".join(commands))

    return damage


def _unpin(pattern: str) -> _Damage:
    """Remove one pin; {uid} is the pod's."""

    def damage(rig: Rig, pod: BedPod) -> None:
        (path,) = _BPFFS.glob(pattern.format(uid=rig.records()[pod.name].pod.uid))
        path.unlink()

    return damage


def _empty(name: str) -> _Damage:
    """Take every entry of every pod out of a map of the node."""

    def damage(_: Rig, __: BedPod) -> None:
        entries = node_map(_BPFFS, name)
        assert entries is not None
        with entries:
            keys = list(entries.keys())
            assert keys
            for key in keys:
                entries.delete(key)

    return damage


def _replace(name: str) -> _Damage:
    """Pin another map in the place of one of ours."""

    def damage(_: Rig, __: BedPod) -> None:
        other = Map.open_pinned(_BPFFS / "node" / "upstreams")
        assert other is not None
        with other:
            (_BPFFS / "node" / name).unlink()
            other.pin(_BPFFS / "node" / name)

    return damage


def _remove_all_pins(_: Rig, __: BedPod) -> None:
    for path in sorted(_BPFFS.rglob("*"), reverse=True):
        # The agent is repairing meanwhile: what is gone, or full again, is its doing.
        with contextlib.suppress(OSError):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()


_OF_BPF = {
    "rule": _run("ip rule del pref 32764"),
    "unreachable-rule": _run("ip -6 rule del pref 32765"),
    "route": _run("ip route del local default dev eth0 table 100"),
    "sysctl": _run("sysctl -qw net.ipv4.tcp_fwmark_accept=0"),
    "reserved-ports": _run("sysctl -qw net.ipv4.ip_local_reserved_ports=15006"),
    "bpf-sk-lookup": _unpin("pods/{uid}/sk_lookup"),
    "bpf-guard": _unpin("pods/{uid}/guard-eth0"),
    "bpf-node": _unpin("node/connect4"),
    "bpf-listeners": _empty("listeners"),
    "bpf-address": _empty("addresses"),
    "bpf-device": _empty("devices"),
    "bpf-gate": _empty("pods"),
}
_OF_TC = {
    "rule": _run("ip rule del pref 32764"),
    "route": _run("ip -6 route flush table 100"),
    "sysctl": _run("sysctl -qw net.ipv4.conf.lo.accept_local=0"),
    "tc-redirect": _unpin("pods/{uid}/redirect-eth0"),
    "tc-arrival": _unpin("pods/{uid}/arrival-lo"),
    "bpf-sk-lookup": _unpin("pods/{uid}/sk_lookup"),
    "bpf-guard": _unpin("pods/{uid}/guard-eth0"),
    "tc-node": _unpin("node/proxy_connect4"),
    "bpf-listeners": _empty("listeners"),
    "tc-gate": _empty("pods"),
    "nftables-fence": _run("nft delete table inet pyambient"),
}
_OF_NFTABLES = {
    "route": _run("ip -6 route flush table 100"),
    "nftables-outbound": _run("nft flush chain ip pyambient outbound"),
    "nftables-inbound": _run("nft flush chain ip6 pyambient inbound"),
    "nftables-tables": _run("nft flush ruleset"),
}
_OF_IPTABLES = {
    "rule": _run("ip -6 rule del pref 32764"),
    "iptables-outbound": _run("iptables -t nat -D OUTPUT -j ISTIO_OUTPUT"),
    "iptables-inbound": _run("ip6tables -t nat -F ISTIO_PRERT"),
    "iptables-foundation": _run("iptables -t mangle -F; iptables -t mangle -X"),
}
_DAMAGES = [
    pytest.param(backend, kind, damage, id=f"{backend}-{kind}")
    for backend, damages in (
        ("bpf", _OF_BPF),
        ("tc", _OF_TC),
        ("nftables", _OF_NFTABLES),
        ("iptables", _OF_IPTABLES),
    )
    for kind, damage in damages.items()
]


def _pods(rig: Rig, backend: str) -> tuple[BedPod, BedPod]:
    """Two enrolled pods that have settled: the agent found all in place once."""
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    rig.start_agent()
    rig.start_proxy()
    for pod in (one, two):
        rig.enroll(pod, backend)
    return one, two


def _repairs(rig: Rig, name: str) -> dict[str, int]:
    pods = {pod["name"]: pod for pod in rig.ask("status")["pods"]}
    return dict(pods[name]["repairs"])


def _problems(rig: Rig, pod: BedPod) -> list[dict[str, Any]]:
    return [check for check in rig.ask("verify", netns=pod.path) if check["problem"]]


@pytest.mark.parametrize(("backend", "kind", "damage"), _DAMAGES)
def test_what_is_lost_is_put_back(rig: Rig, backend: str, kind: str, damage: _Damage) -> None:
    """Found without being told, put back as it was, in the log with the pod's name, and counted."""
    one, two = _pods(rig, backend)
    enrolled = kernel_state(one, two)
    damage(rig, one)
    rig.wait_until(lambda: _repairs(rig, "one").get(kind))
    rig.wait_until(lambda: changes(enrolled, kernel_state(one, two)) == [])
    rig.wait_until(lambda: [_problems(rig, pod) for pod in (one, two)] == [[], []])
    lines = [line for line in rig.logged("repaired") if line["pod"] == "default/one"]
    assert lines
    assert all(line["what"] and line["why"] for line in lines)


@pytest.mark.parametrize("name", ["listeners", "pods", "proxy_sockets"])
def test_a_replaced_map_is_exchanged_again(rig: Rig, name: str) -> None:
    """The map that the programs use is pinned once more; the proxy's listeners are in it."""
    one, two = _pods(rig, "bpf")
    _replace(name)(rig, one)
    rig.wait_until(lambda: _repairs(rig, "one").get("bpf-node") or _repairs(rig, "two"))
    rig.wait_until(lambda: [_problems(rig, pod) for pod in (one, two)] == [[], []])


def test_all_pins_are_gone(rig: Rig) -> None:
    """Everything of BPF is loaded anew, and the proxy that ran all the time is known again."""
    one, two = _pods(rig, "bpf")
    enrolled = kernel_state(one, two)
    _remove_all_pins(rig, one)
    rig.wait_until(lambda: changes(enrolled, kernel_state(one, two)) == [])
    rig.wait_until(lambda: [_problems(rig, pod) for pod in (one, two)] == [[], []])


@pytest.mark.parametrize(
    ("backend", "kind"),
    [("bpf", "bpf-guard"), ("tc", "bpf-guard"), ("tc", "tc-redirect"), ("tc", "tc-arrival")],
)
def test_programs_of_devices_keep_no_map_that_is_gone(rig: Rig, backend: str, kind: str) -> None:
    """Without the node's pins its maps are made anew; the guard went on asking the former."""
    one, two = _pods(rig, backend)
    for pin in (_BPFFS / "node").iterdir():
        pin.unlink()
    rig.wait_until(lambda: all(_repairs(rig, pod.name).get(kind) for pod in (one, two)))
    rig.wait_until(lambda: [_problems(rig, pod) for pod in (one, two)] == [[], []])


def test_the_listener_for_dns_is_put_back_as_well(rig: Rig) -> None:
    """It was the one that nobody missed: DNS over TCP was refused until the proxy was restarted."""
    one, two = _pods(rig, "bpf")
    lost = struct.pack("=QII", one.netns.cookie(), DNS_PORT, 0)
    entries = node_map(_BPFFS, "listeners")
    assert entries is not None
    with entries:
        assert entries.get(lost)
        entries.delete(lost)
    rig.wait_until(lambda: _repairs(rig, "one").get("bpf-listeners"))
    assert [_problems(rig, pod) for pod in (one, two)] == [[], []]


def test_an_untouched_pod_is_not_repaired(rig: Rig, backend: str) -> None:
    """Rounds go by and find nothing; a foreign route and rule are not theirs to mind."""
    one, two = _pods(rig, backend)
    one.ip("route add 198.51.100.0/24 dev eth0", "rule add to 198.51.100.0/24 pref 99 lookup main")
    past = rig.ask("status")["reconcile"]["rounds"]
    rig.wait_until(lambda: rig.ask("status")["reconcile"]["rounds"] > past + 1)
    assert [_repairs(rig, pod.name) for pod in (one, two)] == [{}, {}]
    assert rig.logged("repaired") == []


def test_a_broken_pod_does_not_stop_the_others(rig: Rig) -> None:
    """One that cannot be repaired is logged once, counted as failing, and tried again."""
    one, two = _pods(rig, "bpf")
    one.ip("link set lo down")
    rig.wait_until(lambda: rig.ask("status")["reconcile"]["failing"] == 1)
    two.ip("rule del pref 32764")
    rig.wait_until(lambda: _repairs(rig, "two").get("rule"))
    assert len(rig.logged("cannot repair a pod")) == 1
    one.ip("link set lo up")
    rig.wait_until(lambda: rig.ask("status")["reconcile"]["failing"] == 0)
    rig.wait_until(lambda: [_problems(rig, pod) for pod in (one, two)] == [[], []])
