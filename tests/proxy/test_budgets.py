"""Budgets: what one pod or one peer uses up is missing nowhere else."""

from __future__ import annotations

import dataclasses
import socket

import pytest
import trio

from pyambient.engine.reservoir import Reservoir
from pyambient.model.numbers import HBONE_PORT
from pyambient.observe.logs import configure
from pyambient.proxy.budgets import (
    BUFFERED,
    DESCRIPTORS,
    HANDSHAKE_RATE,
    HANDSHAKES,
    PEER_BUFFERED,
    PIPES,
    SOURCE_HANDSHAKES,
    Budgets,
    Limits,
)

from .rig import proxied, until

SMALL = Limits(
    descriptors=100,
    handshakes=6,
    pod_handshakes=4,
    source_handshakes=4,
    source_burst=3,
    source_rate=1.0,
    total_burst=5,
    total_rate=5.0,
    buffered=1000,
    pod_buffered=800,
    peer_buffered=300,
)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def budgets(clock):
    return Budgets(SMALL, clock)


def test_a_pod_leaves_descriptors_to_the_others(budgets):
    """One pod gets three quarters of them, and all pods together what there is."""
    greedy, modest = budgets.pod("greedy"), budgets.pod("modest")
    taken = 0
    while greedy.may_take(1):
        greedy.take(1)
        taken += 1
    assert taken == 75
    assert modest.may_take(25)
    modest.take(25)
    assert not modest.may_take(1)
    greedy.give(1)
    assert modest.may_take(1)
    assert budgets.refused == {DESCRIPTORS: 2}


def test_workers_divide_what_takes_memory():
    """Not what is a process's own, its descriptors and its time."""
    one, quarter = Limits.of_process(), Limits.of_process(4)
    for name in ("buffered", "pod_buffered", "peer_buffered", "queries"):
        assert getattr(quarter, name) == getattr(one, name) // 4
    for name in ("descriptors", "pod_descriptors", "handshakes", "source_burst", "total_rate"):
        assert getattr(quarter, name) == getattr(one, name)


def test_a_source_begins_so_many_handshakes_and_then_so_many_a_second(budgets, clock):
    """After its burst a peer is refused until time has passed; another peer is not."""
    pod = budgets.pod("pod")

    def begun(source, tries):
        done = 0
        for _ in range(tries):
            if not pod.begin_handshake(source):
                pod.end_handshake(source)
                done += 1
        return done

    assert begun("192.0.2.1", 10) == 3
    assert begun("192.0.2.2", 2) == 2
    clock.now = 2.0
    assert begun("192.0.2.1", 10) == 2
    assert budgets.refused[HANDSHAKE_RATE] == 15


def test_all_sources_together_are_bounded(budgets):
    """A peer that has many addresses does not have as many budgets."""
    pod = budgets.pod("pod")
    begun = 0
    for number in range(50):
        if not pod.begin_handshake(f"2001:db8::{number}"):
            pod.end_handshake(f"2001:db8::{number}")
            begun += 1
    assert begun == 5


def test_handshakes_under_way_are_bounded_for_a_pod_and_for_all(budgets, clock):
    """Peers that never finish theirs take the pod's share, and leave the rest."""
    one, other = budgets.pod("one"), budgets.pod("other")
    refusals = []
    for number in range(5):
        clock.now += 1
        refusals.append(one.begin_handshake(f"192.0.2.{number}"))
    assert refusals == ["", "", "", "", HANDSHAKES]
    assert [other.begin_handshake(f"198.51.100.{n}") for n in range(3)] == ["", "", HANDSHAKES]
    one.end_handshake("192.0.2.0")
    clock.now += 1
    assert other.begin_handshake("198.51.100.9") == ""


def test_one_source_cannot_take_all_handshakes_of_a_pod(clock):
    """Who begins them and never goes on leaves places to others, and gets back what it ends."""
    budgets = Budgets(dataclasses.replace(SMALL, source_handshakes=2), clock)
    pod = budgets.pod("pod")
    refusals = []
    for _ in range(4):
        clock.now += 1
        refusals.append(pod.begin_handshake("192.0.2.1"))
    assert refusals == ["", "", SOURCE_HANDSHAKES, SOURCE_HANDSHAKES]
    assert pod.begin_handshake("192.0.2.2") == ""
    pod.end_handshake("192.0.2.1")
    assert pod.begin_handshake("192.0.2.1") == ""
    for source in ("192.0.2.1", "192.0.2.1", "192.0.2.2"):
        pod.end_handshake(source)
    assert not budgets.handshakes_of


def test_sources_are_forgotten_before_there_are_too_many(budgets, clock):
    """What is remembered of addresses is bounded."""
    for number in range(10_000):
        clock.now += 1
        budgets.source_may(str(number))
    assert len(budgets._sources) <= 4096


def test_kept_bytes_are_bounded_for_a_pod_and_for_all(budgets):
    """A pod's apps that do not read fill its part; what is freed can be taken again."""
    one, other = budgets.pod("one").buffered, budgets.pod("other").buffered
    assert one.take(800)
    assert not one.take(1)
    assert other.take(200)
    assert not other.take(1)
    one.give(500)
    assert other.take(500)
    assert (one.held, other.held, budgets.buffered.held) == (300, 700, 1000)
    assert budgets.refused == {BUFFERED: 2}


def test_what_peers_do_not_read_is_bounded_for_each_and_for_its_pod(budgets):
    """A peer's tunnels have one budget, in whatever pods they end; a pod's have its part."""
    one, other = budgets.pod("one"), budgets.pod("other")
    here, there = one.unread("192.0.2.1"), other.unread("192.0.2.1")
    assert here.keep(200)
    assert there.keep(100)
    assert not there.keep(101)
    assert here.keep(150)
    assert there.keep(150)
    assert budgets.buffered_for == {"192.0.2.1": 300}
    held = [one.unread(f"192.0.2.{number}").keep(300) for number in range(2, 5)]
    assert held == [True, True, False]
    assert (one.buffered.held, other.buffered.held, budgets.buffered.held) == (750, 150, 900)
    assert budgets.refused == {PEER_BUFFERED: 1, BUFFERED: 1}
    assert here.keep(0)
    assert there.keep(0)
    assert "192.0.2.1" not in budgets.buffered_for
    assert budgets.buffered.held == 600


@pytest.mark.parametrize(
    ("kept", "scarce"),
    [({"192.0.2.9": 150}, False), ({"192.0.2.9": 151}, True), ({"1": 300, "2": 101}, True)],
)
def test_what_is_half_used_up_is_scarce(budgets, kept, scarce):
    """The peer's, or the pod's, whoever's tunnels have used it."""
    pod = budgets.pod("pod")
    for peer, count in kept.items():
        assert pod.unread(peer).keep(count)
    assert pod.unread("192.0.2.9").scarce is scarce


@pytest.mark.parametrize("lack", ["descriptors", "bytes"])
def test_a_pipe_is_lent_while_the_pod_has_room_for_it(budgets, lack):
    """Two descriptors and all that it can keep. Who is told no loses nothing: no line is due."""
    pod, lines = budgets.pod("pod"), []
    if lack == "descriptors":
        pod.take(72)
    else:
        assert pod.buffered.take(400)
    configure("plain", "info", lines.append)
    try:
        lent = [pod.take_pipe(300) for _ in range(3)]
    finally:
        configure("plain")
    assert lent == [True, False, False]
    assert lines == []
    assert pod.refused == budgets.refused == {PIPES: 2}
    held, descriptors = pod.buffered.held, pod.descriptors
    pod.give_pipe(300)
    assert (held - pod.buffered.held, descriptors - pod.descriptors) == (300, 2)
    assert pod.take_pipe(300)


def test_a_refusal_gives_back_what_the_pod_had_not_taken():
    """A reservoir that the whole refuses has not changed."""
    whole = Reservoir(10)
    part = Reservoir(100, whole)
    assert not part.take(11)
    assert (part.held, whole.held) == (0, 0)


def test_a_flood_of_refusals_is_one_line_with_their_number(budgets, clock):
    """The log says which pod and budget, at once and then every ten seconds."""
    pod, lines = budgets.pod("default/pod"), []
    configure("plain", "info", lines.append)
    try:
        for second in range(11):
            clock.now = float(second)
            for _ in range(100):
                pod.refuse(DESCRIPTORS)
    finally:
        configure("plain")
    assert len(lines) == 2
    assert "default/pod" in lines[0]
    assert "times=1000" in lines[1]
    assert budgets.refused[DESCRIPTORS] == 1100


def test_a_peer_over_its_rate_is_closed_before_any_tls(bed, tmp_path):
    """The listener of a pod drops connections of a source beyond its burst, and counts them."""
    pod = bed.pod("server")

    async def test(rig):
        await rig.serve(pod)
        peers = []
        for _ in range(5):
            peer = pod.netns.socket(socket.AF_INET, socket.SOCK_STREAM)
            peer.connect((pod.ipv4, HBONE_PORT))
            peer.setblocking(False)
            peers.append(peer)
        await until(lambda: rig.worker.budgets.refused[HANDSHAKE_RATE] == 2)
        closed = 0
        for peer in peers[3:]:
            await trio.lowlevel.wait_readable(peer)
            closed += peer.recv(1) == b""
        assert closed == 2
        for peer in peers[:3]:
            with pytest.raises(BlockingIOError):
                peer.recv(1)
        for peer in peers:
            peer.close()
        assert (await rig.pods.status("server"))["refused"] == {HANDSHAKE_RATE: 2}
        budget = rig.pods._pods["server"].scope.budget
        await until(lambda: not budget.handshakes and not budget.descriptors)

    proxied(bed, tmp_path, test, SMALL)
