"""Each thing that keeps a pod from being enrolled is one line that says what to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pyambient.errors import PyambientError, UsageError
from pyambient.intercept.fib import delivery
from pyambient.intercept.interface import Pod, Site, Step
from pyambient.intercept.iptables import Iptables
from pyambient.intercept.nftables import Nftables
from pyambient.intercept.preflight import preflight
from pyambient.intercept.runner import apply_stages, undo_stages
from pyambient.intercept.survey import survey
from pyambient.netns import Netns
from tests.bed import Bed, BedPod, Channel, Child, kernel_state

from .netfilter_mesh import target


@pytest.fixture
def site(bed: Bed) -> Site:
    return Site(Path("/run/pyambient-unused"), Path("/sys/fs/bpf/pyambient"), bed.cgroup.path)


def _start(pod: BedPod, cgroup: Path | None = None) -> Child:
    """A process in the pod that does nothing."""
    started = pod.spawn(_wait, cgroup=cgroup)
    assert started.receive() == "started"
    return started


def _wait(channel: Channel) -> None:
    channel.send("started")
    channel.receive()


def _refused(pod: Pod, site: Site, backend: str = "iptables") -> PyambientError:
    """What preflight raises, checked for what every user-facing error must be."""
    with pytest.raises(PyambientError) as caught:
        preflight(pod, site, backend)
    assert "\n" not in str(caught.value)
    assert caught.value.then
    return caught.value


def test_a_fresh_pod_passes_and_is_untouched(bed: Bed, site: Site, backend: str) -> None:
    """Nothing is in the way of a pod with an app in it, with IPv6 or without."""
    pods = bed.pod("a"), bed.pod("b", ipv6=False)
    for pod in pods:
        _start(pod)
    before = kernel_state(*pods)
    for pod in pods:
        preflight(target(pod), site, backend)
    assert kernel_state(*pods) == before


def test_without_root(bed: Bed, site: Site) -> None:
    """An ordinary user is told to be root before anything is looked at."""
    pod = bed.pod("a")
    assert bed.node.run(_try, target(pod), site) == (4, "enroll needs root; run it with sudo")


def _try(pod: Pod, site: Site) -> tuple[int, str]:
    try:
        preflight(pod, site, "iptables")
    except PyambientError as error:
        return error.exit_code, str(error)
    return 0, ""


def test_the_hosts_own_namespace(bed: Bed, site: Site) -> None:
    """The namespace that the agent itself is in cannot be enrolled."""
    with Netns.own() as netns:
        error = _refused(Pod("host", netns), site)
    assert isinstance(error, UsageError)
    assert "is the host's own network namespace" in error.what


def test_lo_is_down(bed: Bed, site: Site) -> None:
    """Capture goes by lo, so lo has to be up."""
    pod = bed.pod("a")
    pod.ip("link set lo down")
    assert str(_refused(target(pod), site)) == "lo is down in a; run 'ip -n a link set lo up'"


def test_lo_has_no_ipv6(bed: Bed, site: Site) -> None:
    """IPv6 on a device but not on lo could not be captured; off everywhere is fine."""
    pod = bed.pod("a")
    pod.command("sysctl", "-qw", "net.ipv6.conf.lo.disable_ipv6=1")
    error = _refused(target(pod), site)
    assert error.what == "a has IPv6, but not on lo"
    pod.command("sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=1")
    preflight(target(pod), site, "iptables")


def test_processes_outside_the_cgroup(bed: Bed, site: Site) -> None:
    """With hooks on a cgroup, an app outside of it is named; netfilter does not care."""
    pod = bed.pod("a")
    inside = bed.cgroup.path / "elsewhere" / "deeper"
    inside.mkdir(parents=True, exist_ok=True)
    _start(pod, cgroup=inside)
    preflight(target(pod), site, "bpf")

    outside = _start(pod, cgroup=bed.cgroup.apps)
    narrow = dataclasses.replace(site, cgroup=inside.parent)
    preflight(target(pod), narrow, "iptables")
    error = _refused(target(pod), narrow, "bpf")

    comm = Path(f"/proc/{outside.pid}/comm").read_text().strip()
    assert error.what == (
        f"processes of a are outside --cgroup {narrow.cgroup}: {outside.pid} ({comm})"
    )


def test_many_processes_outside_the_cgroup(bed: Bed, site: Site) -> None:
    """A line stays readable: five are named, the rest is counted."""
    pod = bed.pod("a")
    empty = bed.cgroup.path / "empty"
    empty.mkdir(exist_ok=True)
    for _ in range(7):
        _start(pod)
    error = _refused(target(pod), dataclasses.replace(site, cgroup=empty), "bpf")
    assert error.what.count("(") == 5
    assert error.what.endswith(" and 2 more")


def test_no_cgroup2(bed: Bed, site: Site, tmp_path: Path) -> None:
    """No cgroup2 at all, or a --cgroup that is none, both with a way out."""
    pod = target(bed.pod("a"))
    nowhere = _refused(pod, dataclasses.replace(site, cgroup=None), "bpf")
    assert "--backend iptables" in nowhere.then
    other = _refused(pod, dataclasses.replace(site, cgroup=tmp_path), "bpf")
    assert str(tmp_path) in other.what


@pytest.mark.parametrize(
    "command",
    [
        "iptables-nft -t nat -N ISTIO_OUTPUT",
        "ip6tables-nft -t mangle -N ISTIO_PRERT",
        "iptables-legacy -t nat -N ISTIO_PRERT",
        "ip6tables-legacy -t raw -N ISTIO_OUTPUT",
        "nft add table inet istio-ambient-nat; nft add chain inet istio-ambient-nat output",
    ],
)
def test_another_mesh_is_there(bed: Bed, site: Site, command: str) -> None:
    """Istio's own chains are found wherever one of its backends puts them."""
    pod = bed.pod("a")
    pod.command("sh", "-ec", command)
    assert _refused(target(pod), site).what.startswith("a has rules of another mesh: ")


def test_an_apps_own_rules_are_not_in_the_way(bed: Bed, site: Site) -> None:
    """Rules of the pod's own, in nf_tables and in legacy tables, are no reason to refuse."""
    pod = bed.pod("a")
    for tool in ("iptables-nft", "iptables-legacy"):
        pod.command(tool, "-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.9", "-j", "ACCEPT")
    preflight(target(pod), site, "iptables")


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("route add 192.0.2.0/24 dev eth0 table 100", "a route in table 100"),
        ("-6 route add default dev eth0 table 100", "a route in table 100"),
        ("rule add fwmark 0x5 pref 32764 lookup main", "the ip rule pref 32764 lookup 254"),
        ("-6 rule add from 2001:db8::/32 pref 7 lookup 100", "the ip rule pref 7 lookup 100"),
    ],
)
def test_foreign_routing(bed: Bed, site: Site, command: str, what: str) -> None:
    """A route in our table, a rule at our priority or one into our table belongs to another."""
    pod = bed.pod("a")
    pod.command("ip", *command.split())
    assert _refused(target(pod), site).what == f"a has {what} that is not ours"


def test_what_an_enrolment_without_a_record_left(bed: Bed, site: Site) -> None:
    """Our own steps count as foreign when no record knows them: nothing is enrolled twice."""
    pod = bed.pod("a")
    apply_stages(target(pod), delivery(survey(pod.netns), connects=True))
    assert "that is not ours" in _refused(target(pod), site).what
    other = bed.pod("b")
    apply_stages(target(other), Iptables("nft").plan(target(other), survey(other.netns)).steps)
    assert "ISTIO_" in _refused(target(other), site).what


def test_our_own_tables_without_a_record(bed: Bed, site: Site) -> None:
    """They are in the way of the other backends; backend `nftables` replaces and removes them."""
    pod = bed.pod("a")
    before = kernel_state(pod)
    steps = [step for step in _nftables(pod) if step.kind.startswith("nftables")]
    apply_stages(target(pod), steps)
    for backend in ("bpf", "iptables"):
        assert "mesh: pyambient replies_in" in _refused(target(pod), site, backend).what
    preflight(target(pod), site, "nftables")
    undo_stages(target(pod), apply_stages(target(pod), _nftables(pod)))
    assert kernel_state(pod) == before


def _nftables(pod: BedPod) -> tuple[Step, ...]:
    return Nftables().plan(target(pod), survey(pod.netns)).steps
