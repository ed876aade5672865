"""Loading objects: what goes wrong is one line that says what to do."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest

from pyambient.errors import PyambientError
from pyambient.intercept import libbpf, loader
from pyambient.intercept.kernel_objects import Map, program_info
from pyambient.intercept.loader import BpfObject, Constants, ProgramRefused, load
from pyambient.model import numbers

from .clang import compile_program

_HEADERS = Path(__file__).parents[2] / "bpf"
_REFUSED = """
#include "maps.h"
SEC("cgroup/connect4") int refused(struct bpf_sock_addr *ctx)
{
	return *(volatile __u32 *)(ctx->user_ip4 + 0UL);
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""
_OTHER_SHAPE = """
#include "maps.h"
DEFINE_HASH(pods, __u32, __u32, 1);
SEC("cgroup/connect4") int other(struct bpf_sock_addr *ctx)
{
	__u32 key = 0;
	return map_lookup(pods, &key) != NULL;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the test's own in the place of the compiled programs."""
    monkeypatch.setattr(loader, "OBJECTS", tmp_path)
    return tmp_path


def test_a_missing_object(objects: Path) -> None:
    """An object that was never compiled says how to compile it."""
    with pytest.raises(PyambientError, match=r"connect\.o is missing; run 'make -C bpf'"):
        BpfObject("connect")


def test_a_damaged_object(objects: Path) -> None:
    """A file that is no BPF object says how to get one."""
    (objects / "connect.o").write_bytes(b"\x7fELF, but not really")
    with pytest.raises(PyambientError, match=r"connect\.o is damaged: .*; run 'make -C bpf"):
        BpfObject("connect")


def test_a_refused_program(isolated: None, objects: Path) -> None:
    """The error is the verifier's last informative line; all that it said is kept."""
    compile_program(_REFUSED, objects, "refused")

    with pytest.raises(ProgramRefused) as refused:
        load("refused")

    assert re.search(r"refused refused\.o: R\d+ invalid mem access 'scalar'", str(refused.value))
    assert "\n" not in str(refused.value)
    assert len(refused.value.log) > 5


def test_last_informative_line() -> None:
    """Statistics at the end of a verifier log are no reason, and neither are blank lines."""
    log = (
        "libbpf: prog 'x': BPF program load failed: Permission denied",
        "libbpf: prog 'x': -- BEGIN PROG LOAD LOG --",
        "0: (b7) r0 = 7",
        "At program exit the register R0 has value (0x7; 0x0) should have been in (0x0; 0x1)",
        "",
        "processed 2 insns (limit 1000000) max_states_per_insn 0",
        "-- END PROG LOAD LOG --",
        "libbpf: failed to load object 'x.o'",
    )
    assert loader.last_informative(log).startswith("At program exit")
    assert loader.last_informative(log[:1]).startswith("prog 'x': BPF program load failed")
    assert loader.last_informative(()) == ""


def test_a_map_of_another_shape(isolated: None, objects: Path) -> None:
    """Pinned maps of another version are not written over, but named."""
    compile_program(_OTHER_SHAPE, objects, "other")
    with load("other") as other, other.maps()["pods"] as pods:
        loader.OBJECTS = loader.Path(loader.__file__).with_name("objects")
        with pytest.raises(PyambientError, match="pinned map pods is of another version"):
            load("bind", shared={"pods": pods})


def test_constants_of_another_version(isolated: None, objects: Path) -> None:
    """Constants that do not fit the object are refused, not cut off."""
    source = '#include "maps.h"\nvolatile const __u64 constants = 0;\n' + _OTHER_SHAPE.replace(
        "__u32 key = 0", "__u32 key = constants"
    )
    compile_program(source, objects, "other")
    with pytest.raises(PyambientError, match="constants of another version"):
        load("other")


def test_maps_are_shared(isolated: None) -> None:
    """A map handed to a load is the map its programs use."""
    with load("bind") as bind, bind.maps()["pods"] as pods:
        connect = load("connect", Constants(), {"pods": pods})
        with connect, connect.maps()["pods"] as used:
            assert used.identifier == pods.identifier
        pods.put(struct.pack("=Q", 7), struct.pack("=II", 9, 1))
        assert pods.get(struct.pack("=Q", 7)) == struct.pack("=II", 9, 1)
        assert list(pods.keys()) == [struct.pack("=Q", 7)]
        pods.delete(struct.pack("=Q", 7))
        pods.delete(struct.pack("=Q", 7))
        assert pods.get(struct.pack("=Q", 7)) is None


def test_handles_introduce_themselves(isolated: None) -> None:
    """Every long-lived handle has a name for people."""
    with load("bind") as bind, bind.maps()["pods"] as pods:
        assert repr(bind) == "<BpfObject bind>"
        assert repr(pods) == f"<Map pods fd {pods.fd}>"
    assert (repr(bind), repr(pods)) == ("<BpfObject bind closed>", "<Map pods fd -1>")


def test_what_is_gone_is_none(isolated: None, tmp_path: Path) -> None:
    """Pins and programs that do not exist are an answer, other failures an error."""
    assert Map.open_pinned(tmp_path / "nothing") is None
    assert program_info(0x7FFFFFFF) is None
    with pytest.raises(OSError, match="bpf_obj_get"):
        libbpf.call("bpf_obj_get", str(tmp_path).encode())


def test_the_header_says_the_same_as_the_model() -> None:
    """Ports and marks in C are the ones in Python."""
    text = "".join(path.read_text() for path in sorted(_HEADERS.glob("*.[ch]")))
    found = {
        name: int(value, 0)
        for name, value in re.findall(r"#define (\w+)\s+(\w+)\n", text)
        if value[0].isdigit()
    }
    for name in (
        "OUTBOUND_PORT",
        "INBOUND_PORT",
        "HBONE_PORT",
        "DNS_PORT",
        "LOOPBACK_MARK",
        "MARK_MASK",
    ):
        assert found[name] == getattr(numbers, name)


def test_what_is_no_map_is_closed(isolated: None) -> None:
    """The descriptor is the map's from the first moment on: it was left open when asking failed."""
    descriptor = os.memfd_create("no map")
    with pytest.raises(OSError, match="bpf_obj_get_info_by_fd"):
        Map(descriptor, "no map")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
