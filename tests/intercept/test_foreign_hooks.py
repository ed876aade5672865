"""Beside another tool that rewrites where apps connect to, as Cilium's socket load balancer does.

Its program turns a VIP that nobody has into the address of a pod outside the mesh.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyambient.cli.main import cli
from pyambient.errors import PyambientError
from pyambient.intercept import loader
from pyambient.intercept.foreign_hooks import foreign_hooks
from pyambient.intercept.kernel_objects import AttachType, Link
from pyambient.model.address import SocketAddress
from tests.bed import Bed, BedPod, CgroupTree, apps
from tests.bed.privileges import Capability

from .bpf_mesh import PORT, BpfMesh, at, serve
from .clang import compile_program
from .dns_apps import Answer, ask, resolve, resolver_at

_VIP = {"v4": "192.0.2.80", "v6": "2001:db8::80"}
_SOURCE = """
#include "maps.h"
#define V4(a) bpf_htonl(a)

SEC("cgroup/connect4") int cil_sock4_connect(struct bpf_sock_addr *ctx)
{
	if (ctx->user_ip4 == V4(VIP4))
		ctx->user_ip4 = V4(BACKEND4);
	return 1;
}

SEC("cgroup/connect6") int cil_sock6_connect(struct bpf_sock_addr *ctx)
{
	if (ctx->user_ip6[0] != V4(VIP6_0) || ctx->user_ip6[3] != V4(VIP6_3))
		return 1;
	ctx->user_ip6[0] = V4(BACKEND6_0);
	ctx->user_ip6[1] = V4(BACKEND6_1);
	ctx->user_ip6[2] = V4(BACKEND6_2);
	ctx->user_ip6[3] = V4(BACKEND6_3);
	return 1;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""
_PROGRAMS = {
    AttachType.CONNECT4: "cil_sock4_connect",
    AttachType.CONNECT6: "cil_sock6_connect",
}


def _words(ip: str, family: int) -> list[str]:
    packed = socket.inet_pton(family, ip)
    return [hex(int.from_bytes(packed[i : i + 4], "big")) for i in range(0, len(packed), 4)]


def _balancer(backend: BedPod) -> str:
    """The program's source, for this backend."""
    told = {"VIP4": _VIP["v4"], "BACKEND4": backend.ipv4}
    lines = [f"#define {name} {_words(ip, socket.AF_INET)[0]}" for name, ip in told.items()]
    for name, ip in (("VIP6", _VIP["v6"]), ("BACKEND6", backend.ipv6)):
        words = _words(ip, socket.AF_INET6)
        lines += [f"#define {name}_{number} {word}" for number, word in enumerate(words)]
    return "\n".join((*lines, _SOURCE))


@contextlib.contextmanager
def balancing(cgroup: Path, backend: BedPod, directory: Path) -> Iterator[None]:
    """The other tool is on this cgroup, behind what is on it already."""
    compile_program(_balancer(backend), directory, "balancer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "OBJECTS", directory)
        loaded = loader.load_compiled("balancer", loader.Constants(), {})
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        stack.enter_context(loaded)
        for hook, program in _PROGRAMS.items():
            link = stack.enter_context(Link.create(loaded.program_fd(program), fd, hook))
            stack.callback(link.detach)
        yield


@pytest.fixture
def bed(cgroup_tree: CgroupTree) -> Iterator[Bed]:
    """In a cgroup below the session's: what is above it is still nobody else's."""
    tree = CgroupTree(cgroup_tree.path / "inner")
    tree.apps.mkdir(parents=True)
    try:
        with Bed(tree) as made:
            yield made
    finally:
        tree.remove()


@pytest.fixture
def pods(bed: Bed) -> tuple[BedPod, BedPod, BedPod]:
    """Pods a and b, and the backend outside the mesh."""
    return bed.pod("a"), bed.pod("b"), bed.pod("outside")


def _assert_captured(mesh: BpfMesh, pods: tuple[BedPod, ...], family: str) -> None:
    """A connect to the VIP is the proxy's, which is told the backend; so is any other one."""
    outside = pods[2]
    vip = SocketAddress(_VIP[family], PORT)
    for pod in pods[:2]:
        for destination in (vip, at(outside, family)):
            assert pod.run(apps.request, destination).data == b"hello"
    backend = at(outside, family)
    seen = [(one.pod, one.original) for one in mesh.intercepted()]
    assert seen == [(name, backend) for name in ("a", "a", "b", "b")]


@pytest.mark.parametrize("where", ["on ours, later", "above", "below"])
def test_captured_is_what_it_chose(bed, pods, family, tmp_path, where) -> None:
    """After our hooks (attached later, or above) or before them (below): none gets past the proxy.

    DNS goes on as well; its hooks are not the other tool's.
    """
    a, b, outside = pods
    cgroup = {
        "on ours, later": bed.cgroup.path,
        "above": bed.cgroup.path.parent,
        "below": bed.cgroup.apps,
    }[where]
    with contextlib.ExitStack() as stack:
        stack.enter_context(serve(outside))
        stack.enter_context(resolve(outside))
        if where == "on ours, later":
            mesh = stack.enter_context(BpfMesh(bed, a, b))
        stack.enter_context(balancing(cgroup, outside, tmp_path))
        if where != "on ours, later":
            mesh = stack.enter_context(BpfMesh(bed, a, b))
        _assert_captured(mesh, pods, family)
        answer = a.run(ask, resolver_at(outside, family), b"who", connected=True)
        assert isinstance(answer, Answer), answer
        assert answer.sender == resolver_at(outside, family)


def test_a_bound_device_is_no_way_around(bed, pods, family, tmp_path) -> None:
    """Nor is a mark: the guard judges what leaves, wherever it was sent to at first."""
    a, b, outside = pods
    vip = SocketAddress(_VIP[family], PORT)
    with serve(outside), BpfMesh(bed, a, b) as mesh:
        with balancing(bed.cgroup.path, outside, tmp_path):
            options = apps.ClientOptions(device="eth0", mark=0x539)
            rights = [Capability.NET_RAW, Capability.NET_ADMIN]
            seen = a.run(apps.request, vip, b"x", options, capabilities=rights)
        assert seen.data == b"x"
        assert [one.original for one in mesh.intercepted()] == [at(outside, family)]


def test_one_that_comes_first_on_our_cgroup_is_refused(bed, pods, tmp_path) -> None:
    """In a line that says which program it is, and where; nothing is left behind."""
    a, b, outside = pods
    mesh = BpfMesh(bed, a, b)
    with balancing(bed.cgroup.path, outside, tmp_path):
        with pytest.raises(PyambientError) as refused:
            mesh.prepare()
        (hook, _) = foreign_hooks(bed.cgroup.path, "pyamb_")
    assert f"cil_sock4_conne (id {hook.identifier}, connect4 of {bed.cgroup.path})" in str(
        refused.value
    )
    assert "--backend iptables" in refused.value.then
    assert not bed.cgroup.proxy.exists()


@pytest.mark.parametrize("where", ["on it", "below"])
def test_check_names_them(bed, pods, tmp_path, where) -> None:
    """Each with its id and cgroup; `bpf` is out only where it comes first on the very cgroup."""
    cgroup = bed.cgroup.path if where == "on it" else bed.cgroup.apps
    words = ["check", f"--cgroup={bed.cgroup.path}"]
    with balancing(cgroup, pods[2], tmp_path):
        lines = CliRunner().invoke(cli, words).stdout.splitlines()
        told = json.loads(CliRunner().invoke(cli, [*words, "-o", "json"]).stdout)
    named = [line for line in lines if f"of {cgroup})" in line]
    mark = "✘" if where == "on it" else "‼"
    assert [line.split()[0] for line in named] == [mark] * 2
    assert "cil_sock4_conne (id " in named[0]
    assert told["backends"]["bpf"] == (where == "below")
    assert told["backends"]["tc"]
