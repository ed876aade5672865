"""The bed's networks and apps: a bed that lies is worse than none."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

from pyambient.model.address import SocketAddress
from tests.bed import Accepted, Bed, BedPod, CgroupTree, Child, ClientOptions, Network, apps
from tests.bed.bpf import KERNELS_OWN, pins
from tests.bed.cgroup import cgroup2_mount


def _serve(pod: BedPod, port: int = 8080, *, at_eof: bool = False) -> Child:
    server = pod.spawn(apps.echo_server, port, at_eof=at_eof)
    assert server.receive() == "listening"
    return server


def test_the_session_has_namespaces_of_its_own(isolated: None) -> None:
    """Network and mount namespace are not those of the process that started pytest."""
    for kind in ("net", "mnt"):
        parents = Path(f"/proc/{os.getppid()}/ns/{kind}")
        assert Path(f"/proc/self/ns/{kind}").readlink() != parents.readlink()


def test_named_namespaces_are_private(bed: Bed) -> None:
    """A pod's name is not seen by the rest of the machine, whose /run is otherwise still here."""
    pod = bed.pod("a")
    assert Path(pod.path).exists()
    assert not Path(f"/proc/{os.getppid()}/root{pod.path}").exists()


def test_bpffs_is_private_and_empty(isolated: None) -> None:
    """Pins of the machine are not in the session's bpffs; it holds just the kernel's own two."""
    mounts = Path("/proc/self/mountinfo").read_text()
    assert "/sys/fs/bpf rw,relatime - bpf pyambient-tests" in mounts
    assert set(pins()) <= KERNELS_OWN


def test_the_cgroup_tree_is_below_the_mount(cgroup_tree: CgroupTree) -> None:
    """The sub-tree is a directory of its own: hooks on it see nothing of the machine."""
    assert cgroup_tree.path.parent == cgroup2_mount()
    assert cgroup_tree.path.name == f"pyambient-tests-{os.getpid()}"


def test_a_tree_is_removed_with_all_in_it(isolated: None, tmp_path: Path) -> None:
    """Removing a tree ends what runs in it and deletes directories made later, too."""
    tree = CgroupTree(cgroup2_mount() / f"pyambient-tests-{os.getpid()}-second")
    (tree.apps / "deeper").mkdir(parents=True)
    sleeper = subprocess.Popen(["sleep", "60"])
    (tree.apps / "deeper/cgroup.procs").write_text(str(sleeper.pid))
    tree.remove()
    assert not tree.path.exists()
    sleeper.wait()


def test_a_dead_sessions_tree_is_swept(isolated: None) -> None:
    """A session that could not clean up is cleaned up after by the next."""
    ended = subprocess.run(["sh", "-c", "echo $$"], check=True, capture_output=True, text=True)
    left = cgroup2_mount() / f"pyambient-tests-{ended.stdout.strip()}" / "apps"
    left.mkdir(parents=True)
    CgroupTree.sweep(cgroup2_mount())
    assert not left.parent.exists()


def test_pods_reach_each_other(bed: Bed, family: str) -> None:
    """Two pods exchange data, and each sees the other's true address."""
    client, server = bed.pod("a"), bed.pod("b")
    echo = _serve(server)
    destination = SocketAddress(server.address(family), 8080)

    seen = client.run(apps.request, destination, b"ping")

    assert (seen.data, seen.errno, seen.peer) == (b"ping", None, destination)
    assert echo.ask("accepted") == [Accepted(seen.local, destination)]
    assert seen.local.ip == client.address(family)


def test_addresses_count_up(bed: Bed) -> None:
    """Addresses follow the order of creation, and a family can be left out."""
    pods = [bed.pod("a"), bed.pod("b", ipv6=False), bed.pod("c", ipv4=False)]
    assert [pod.ipv4 for pod in pods] == ["10.77.0.2", "10.77.0.3", None]
    assert [pod.ipv6 for pod in pods] == ["fd77::2", None, "fd77::4"]
    assert "inet6" not in pods[1].command("ip", "addr")


def test_the_node_reaches_pods_and_is_their_router(bed: Bed, family: str) -> None:
    """The node has an address on the bridge, and pods have a default route by it."""
    pod = bed.pod("a")
    echo = _serve(pod)
    destination = SocketAddress(pod.address(family), 8080)
    assert bed.node.run(apps.request, destination).data == b"hello"
    (accepted,) = echo.ask("accepted")
    assert accepted.peer.ip == bed.node.address(family)
    assert f"default via {bed.node.ipv4} dev eth0" in pod.command("ip", "route")
    assert f"default via {bed.node.ipv6} dev eth0" in pod.command("ip", "-6", "route")


def test_a_second_device_joins_another_network(bed: Bed, family: str) -> None:
    """A device added to a living pod reaches the pods of its network, and only they it."""
    side = bed.add_network(Network("br78", "10.78.0", "fd78::", node_is_router=False))
    pod, neighbour = bed.pod("a"), bed.pod("b", network=side)
    _serve(neighbour)
    destination = SocketAddress(neighbour.address(family), 8080)
    assert pod.run(apps.request, destination, options=ClientOptions(timeout=0.5)).failed

    addresses = bed.add_device(pod, "eth1", side)

    bound = pod.run(apps.request, destination, options=ClientOptions(device="eth1"))
    assert bound.data == b"hello"
    assert bound.local.ip in addresses


def test_twins_have_one_address_and_two_worlds(bed: Bed, family: str) -> None:
    """Equal addresses in two networks: each peer reaches its own pod."""
    one, two = bed.twin_networks()
    assert (one.pod.ipv4, one.pod.ipv6) == (two.pod.ipv4, two.pod.ipv6)
    servers = [_serve(twin.pod) for twin in (one, two)]
    destination = SocketAddress(one.pod.address(family), 8080)

    one.peer.run(apps.request, destination)

    assert [len(server.ask("accepted")) for server in servers] == [1, 0]


def test_the_echo_server_respects_half_close(bed: Bed, family: str) -> None:
    """Kept back until the client's end of stream, 1 MiB comes back after it, whole."""
    client, server = bed.pod("a"), bed.pod("b")
    _serve(server, at_eof=True)
    data = os.urandom(1 << 20)
    seen = client.run(apps.request, SocketAddress(server.address(family), 8080), data)
    assert (seen.stage, seen.data == data) == ("done", True)


def test_a_refused_port_is_reported_as_such(bed: Bed, family: str) -> None:
    """The client says at which stage and with which errno it failed."""
    client, server = bed.pod("a"), bed.pod("b")
    seen = client.run(apps.request, SocketAddress(server.address(family), 9))
    assert (seen.stage, seen.errno, seen.data) == ("connect", errno.ECONNREFUSED, b"")


def test_a_client_can_be_v4_mapped_and_bound(bed: Bed) -> None:
    """Options reach the socket: an IPv6 socket to IPv4, and a chosen source address."""
    client, server = bed.pod("a"), bed.pod("b")
    client.ip("addr add 10.77.0.99/24 dev eth0")
    echo = _serve(server)
    destination = SocketAddress(server.address("v4"), 8080)
    mapped = client.run(apps.request, destination, options=ClientOptions(v4_mapped=True))
    bound = client.run(apps.request, destination, options=ClientOptions(source="10.77.0.99"))
    assert (mapped.data, mapped.peer) == (b"hello", destination)
    assert bound.local.ip == "10.77.0.99"
    assert [one.peer for one in echo.ask("accepted")] == [mapped.local, bound.local]


def test_held_connections_report_what_broke(bed: Bed, family: str) -> None:
    """Many connections stay open and answer; after the server's end all are reported broken."""
    client, server = bed.pod("a"), bed.pod("b")
    echo = _serve(server)
    holder = client.spawn(apps.hold, SocketAddress(server.address(family), 8080), 50)
    assert holder.receive() == {}
    assert holder.ask("ping") == {}
    assert len(echo.ask("accepted")) == 50
    echo.kill()
    assert set(holder.ask("ping")) == set(range(50))


def test_udp_is_echoed(bed: Bed, family: str) -> None:
    """Datagrams come back from the address they went to."""
    client, server = bed.pod("a"), bed.pod("b")
    echo = server.spawn(apps.udp_echo, 5353)
    assert echo.receive() == "listening"
    destination = SocketAddress(server.address(family), 5353)
    seen = client.run(apps.udp_request, destination, b"query")
    assert (seen.data, seen.peer) == (b"query", destination)
