"""The entries of pods to the programs that they share, and what becomes of it without those."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest

from pyambient.intercept.entry import Choice, device_entry, lookup_entry
from pyambient.intercept.kernel_objects import Map, MapType
from pyambient.intercept.loader import Constants, LoadedObject, load
from pyambient.intercept.node_hooks import GUARD, LOOKUP
from tests.bed import Bed, apps
from tests.bed.bpf import run_program

from .bpf_mesh import BPFFS, BpfMesh, at, serve

_DROP, _PASS, _SHOT = 0, 1, 2
_NETNS = 0x1234_5678_9ABC_DEF0
_LOCAL = struct.pack("=4s16s", socket.inet_aton("10.77.0.2"), b"")
_REMOTE = struct.pack("=4s16s", socket.inet_aton("10.77.0.9"), b"")


@pytest.fixture
def lookup(isolated: None) -> Iterator[LoadedObject]:
    """The program itself, loaded and offered to nobody."""
    with load("lookup", Constants(has_ingress_ifindex=True)) as loaded:
        yield loaded


@contextlib.contextmanager
def array() -> Iterator[Map]:
    with Map.create(MapType.PROG_ARRAY, "program", (4, 4), 1, 0) as made:
        yield made


@contextlib.contextmanager
def entered(lookup: LoadedObject) -> Iterator[Map]:
    with contextlib.ExitStack() as stack:
        maps = {name: stack.enter_context(one) for name, one in lookup.maps().items()}
        yield maps["entered"]


def look_up(program: int, local_port: int = 80, protocol: int = socket.IPPROTO_TCP) -> int:
    """What it says of a connection from port 40000 of a stranger."""
    head = struct.pack("=QII", 0, socket.AF_INET, protocol) + _REMOTE
    context = head + struct.pack("!H2x", 40000) + _LOCAL + struct.pack("=II4x", local_port, 0)
    return run_program(program, context=context)[0]


def test_an_entry_that_leads_nowhere_drops(lookup: LoadedObject) -> None:
    """What would decide is not there."""
    with (
        array() as nothing,
        entered(lookup) as said,
        lookup_entry("entry", nothing, said, _NETNS) as entry,
    ):
        assert look_up(entry.fd) == _DROP
    with array() as nothing, device_entry("entry", nothing, _NETNS, Choice.IS_ETHERNET) as entry:
        assert run_program(entry.fd, data=bytes(64))[0] == _SHOT


def test_an_entry_says_whose_it_is(lookup: LoadedObject) -> None:
    """The whole cookie, and which look-up it is."""
    with array() as nothing, entered(lookup) as said:
        with lookup_entry("entry", nothing, said, _NETNS) as entry:
            look_up(entry.fd)
        expected = struct.pack("=Q", _NETNS) + struct.pack("!H", 40000) + struct.pack("=H4x", 80)
        assert expected in said.get_of_each_cpu(bytes(4))


def test_what_another_look_up_has_said_is_no_good(lookup: LoadedObject) -> None:
    """One that came between an entry and the program."""
    program = lookup.program_fd(LOOKUP.program)
    with entered(lookup) as said, array() as nothing:
        with lookup_entry("entry", nothing, said, _NETNS) as entry:
            for _ in range(64):  # on each CPU that the test may run on
                look_up(entry.fd)
        assert look_up(program, 81) == _DROP
        assert look_up(program, 81, socket.IPPROTO_UDP) == _PASS


@pytest.mark.parametrize("pin", [LOOKUP.map, GUARD.map])
def test_without_a_shared_program_nothing_gets_through(bed: Bed, family: str, pin: str) -> None:
    """Its map's pin is all that keeps it: neither outbound nor inbound is left unguarded."""
    a, b, outside = (bed.pod(name) for name in ("a", "b", "outside"))
    options = apps.ClientOptions(timeout=1)
    with BpfMesh(bed, a, b), serve(a), serve(outside):
        (BPFFS / "node" / pin).unlink()
        out = a.run(apps.request, at(outside, family), options=options)
        into = outside.run(apps.request, at(a, family), options=options)
        assert (out.data, into.data) == (b"", b"")
