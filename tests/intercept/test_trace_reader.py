"""Places of readers: bounded, leased, and given back, whatever ends the reader."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest

from pyambient.errors import PyambientError
from pyambient.intercept import trace_reader
from pyambient.intercept.node_pins import node_map
from pyambient.intercept.trace_reader import (
    PLACES_MAP,
    READERS,
    RINGS_MAP,
    TraceReader,
    clear_dead,
)
from pyambient.model.address import SocketAddress
from tests.bed import Bed, BedPod, Channel, apps

from .bpf_mesh import BPFFS, BpfMesh, at

_SMALL_RING = mmap.PAGESIZE
_EVENT_BYTES = 88 + 8  # with the header of each record
_MORE_THAN_FITS = _SMALL_RING // _EVENT_BYTES + 20
_AN_HOUR = 3600 * 10**9
_OVER_AT_ONCE = 1


@pytest.fixture
def mesh(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> Iterator[BpfMesh]:
    """Pods a and b enrolled, c outside; no proxy: connects are quick. No lease ends here."""
    monkeypatch.setattr(trace_reader, "LEASE", _AN_HOUR)
    with BpfMesh(bed, bed.pod("a"), bed.pod("b")) as made:
        bed.pod("c")
        assert made.proxy is not None
        made.proxy.child.kill()
        yield made


@pytest.fixture
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings that a test can fill."""
    monkeypatch.setattr(trace_reader, "RING_BYTES", _SMALL_RING)


def _open_dead(monkeypatch: pytest.MonkeyPatch) -> TraceReader:
    """One whose lease is over."""
    with monkeypatch.context() as patch:
        patch.setattr(trace_reader, "LEASE", _OVER_AT_ONCE)
        return _open()


def _open() -> TraceReader:
    opened = TraceReader.open(BPFFS)
    assert opened is not None
    return opened


def _connect_often(destination: SocketAddress, times: int) -> None:
    for _ in range(times):
        apps.request(destination)


def _refuse(mesh: BpfMesh, times: int) -> None:
    """So many events of pod a."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    a.run(_connect_often, at(c, "v4"), times)


def _places() -> bytes:
    found = node_map(BPFFS, PLACES_MAP)
    assert found is not None
    with found:
        return found.get(bytes(4)) or b""


def _rings() -> int:
    """How many rings the kernel holds for readers."""
    found = node_map(BPFFS, RINGS_MAP)
    assert found is not None
    with found:
        keys = [number.to_bytes(4, "little") for number in range(READERS)]
        return sum(found.get(key) is not None for key in keys)


def test_a_slow_reader_is_told_what_it_lost(mesh: BpfMesh, small_rings: None) -> None:
    """Those that came first are there, the others are counted, and none twice."""
    with _open() as slow, _open() as other:
        _refuse(mesh, _MORE_THAN_FITS)
        seen, lost = len(slow.read(1 << 20)), slow.newly_lost()
        assert (seen, lost) == (_MORE_THAN_FITS - lost, lost)
        assert min(seen, lost) > 0
        assert slow.newly_lost() == 0
        _refuse(mesh, 1)
        assert len(slow.read(10)) == 1
        assert slow.newly_lost() == 0
        assert other.newly_lost() == lost + 1


def test_a_slow_reader_costs_another_nothing(mesh: BpfMesh, small_rings: None) -> None:
    """One that reads loses nothing beside one that does not."""
    with _open() as slow, _open() as quick:
        seen = 0
        for _ in range(10):
            _refuse(mesh, _MORE_THAN_FITS // 10)
            seen += len(quick.read(1 << 20))
        assert (seen, quick.newly_lost()) == (_MORE_THAN_FITS // 10 * 10, 0)
        assert slow.newly_lost() > 0


def test_no_more_at_once_than_asked_for(mesh: BpfMesh) -> None:
    """What is left is there the next time, and makes the reader readable until then."""
    with _open() as reader:
        _refuse(mesh, 5)
        first = reader.read(3)
        assert [len(first), len(reader.read(3)), len(reader.read(3))] == [3, 2, 0]


def test_nothing_is_left_of_a_reader(mesh: BpfMesh) -> None:
    """Neither a lease nor a ring."""
    before = _places()
    assert not any(before)
    with _open():
        assert (_places() != before, _rings()) == (True, 1)
    assert (_places(), _rings()) == (before, 0)


def test_one_reader_too_many(mesh: BpfMesh) -> None:
    """Is refused in one line, and comes in when another has gone."""
    readers = [_open() for _ in range(READERS)]
    with pytest.raises(PyambientError, match="4 others trace already; end one"):
        _open()
    readers.pop().close()
    readers.append(_open())
    for reader in readers:
        reader.close()
    assert _rings() == 0


def _read_for_ever(channel: Channel, lease: int) -> None:
    trace_reader.LEASE = lease  # type: ignore[misc]
    with _open():
        channel.send("reading")
        channel.receive()


def _killed_reader(bed: Bed, lease: int = _OVER_AT_ONCE) -> None:
    reader = bed.node.spawn(_read_for_ever, lease, uid=0, gid=0)
    assert reader.receive() == "reading"
    reader.kill()


def test_a_killed_reader_costs_no_more_than_its_lease(mesh: BpfMesh, small_rings: None) -> None:
    """After it nothing is written for it any more; what is left of it goes with the next round."""
    _killed_reader(mesh.bed)
    before = _places()
    assert (any(before), _rings()) == (True, 1)
    _refuse(mesh, _MORE_THAN_FITS)
    assert _places() == before  # where what was lost would be counted
    assert clear_dead(BPFFS) == 1
    assert (any(_places()), _rings()) == (False, 0)


def test_whose_lease_is_not_over_is_not_dead(mesh: BpfMesh) -> None:
    """Nobody asks whether its process is still there."""
    _killed_reader(mesh.bed, _AN_HOUR)
    with _open() as reader:
        assert clear_dead(BPFFS) == 0
        assert (_rings(), reader.is_current()) == (2, True)


def test_killed_readers_are_in_nobodys_way(mesh: BpfMesh) -> None:
    """Without an agent, a reader takes the place of a dead one."""
    for _ in range(READERS):
        _killed_reader(mesh.bed)
    with _open() as reader:
        _refuse(mesh, 1)
        assert len(reader.read(10)) == 1


def test_a_reader_that_slept_is_told_for_how_long(
    mesh: BpfMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was decided meanwhile it does not get; what comes after it does."""
    with _open() as reader:
        assert reader.prolong() == 0
    with _open_dead(monkeypatch) as reader:
        _refuse(mesh, 1)
        assert reader.prolong() > 0
        _refuse(mesh, 2)
        assert reader.is_current()
        assert len(reader.read(10)) == 2


def test_a_reader_that_slept_may_have_lost_its_place(
    mesh: BpfMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it disturbs the one who has it now in nothing, its end included."""
    slept = _open_dead(monkeypatch)
    with _open() as other:
        slept.prolong()
        assert not slept.is_current()
        assert slept.newly_lost() == 0
        slept.close()
        assert other.is_current()
        _refuse(mesh, 1)
        assert len(other.read(10)) == 1


def test_the_last_pod_takes_the_maps_along(mesh: BpfMesh) -> None:
    """A reader notices, and can read again when there is a pod again."""
    a: BedPod = mesh.bed.pods["a"]
    with _open() as reader:
        mesh.release()
        assert not reader.is_current()
        assert TraceReader.open(BPFFS) is None
    mesh.recorded.clear()
    mesh.prepare()
    mesh.listen()
    mesh.capture()
    with _open() as reader:
        a.run(apps.request, at(mesh.bed.pods["c"], "v4"))
        assert [event.decision for event in reader.read(10)] == ["captured"]
