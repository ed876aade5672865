"""What a pod's selections leave alone, with every backend: two pods, both directions, live."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import pytest

from pyambient.intercept.options import CaptureOptions
from pyambient.model.numbers import INBOUND_PORT, OUTBOUND_PORT
from tests.bed import Bed, BedPod, Child, apps
from tests.bed.snapshot import changes, kernel_state

from .bpf_mesh import PORT, BpfMesh, at, serve
from .netfilter_mesh import INTERCEPTORS, NetfilterMesh

_Mesh: TypeAlias = BpfMesh | NetfilterMesh
_OTHER_PORT = 8081
# Of the bed's pods: a and b are enrolled, c and d are outside.
_NAMES = ("a", "b", "c", "d")


@pytest.fixture(params=["bpf", "tc", *INTERCEPTORS])
def backend(request: pytest.FixtureRequest) -> str:
    """The backend, and of iptables the variant."""
    return str(request.param)


@pytest.fixture
def pods(bed: Bed) -> dict[str, BedPod]:
    return {name: bed.pod(name) for name in _NAMES}


@pytest.fixture
def mesh(
    bed: Bed, pods: dict[str, BedPod], backend: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[_Mesh]:
    """Pods a and b, to be enrolled with options of their own; nothing is left of them."""
    before = _state(pods)
    if backend in INTERCEPTORS:
        yield NetfilterMesh(bed, pods["a"], pods["b"], interceptor=INTERCEPTORS[backend])
    else:
        monkeypatch.setattr(BpfMesh, "backend", backend)
        yield BpfMesh(bed, pods["a"], pods["b"])
    assert changes(before, _state(pods)) == []


def _state(pods: dict[str, BedPod]) -> dict[str, Any]:
    """A legacy table stays once it was used, and its chains count; no chain of ours does."""
    state = kernel_state(*pods.values())
    for of_one in state.values():
        of_one["iptables"] = [line for line in of_one["iptables"] if "ISTIO_" in line]
    return state


def _options(**fields: Any) -> CaptureOptions:
    return CaptureOptions.from_json(fields)


def _change(mesh: _Mesh, pod: BedPod, **fields: Any) -> None:
    """What the agent does when an operator chooses something else for a live pod."""
    mesh.options[pod.name] = _options(**fields)
    mesh.refresh(pod)


def _fetch(client: BedPod, server: BedPod, family: str, port: int = PORT) -> None:
    exchange = client.run(apps.request, at(server, family, port), b"hello")
    assert (exchange.data, exchange.errno) == (b"hello", None)


def _reached(mesh: _Mesh) -> list[tuple[str, int]]:
    return [(seen.pod, seen.port) for seen in mesh.intercepted()]


def _host(pod: BedPod, family: str) -> str:
    return f"{pod.address(family)}/{32 if family == 'v4' else 128}"


def _hold(client: BedPod, server: BedPod, family: str) -> Child:
    held = client.spawn(apps.hold, at(server, family), 2)
    assert held.receive() == {}
    return held


def test_a_cidr_is_excluded_for_one_pod(mesh: _Mesh, pods: dict[str, BedPod], family: str) -> None:
    """Pod a goes straight to d and by the proxy to c; pod b, which excludes c, the other way."""
    for server in (pods["c"], pods["d"]):
        serve(server)
    mesh.options = {
        "a": _options(outbound={"exclude_cidrs": _host(pods["d"], family)}),
        "b": _options(outbound={"exclude_cidrs": _host(pods["c"], family)}),
    }
    with mesh:
        for client in (pods["a"], pods["b"]):
            for server in (pods["c"], pods["d"]):
                _fetch(client, server, family)
        assert [(s.pod, s.original.ip) for s in mesh.intercepted()] == [
            ("a", pods["c"].address(family)),
            ("b", pods["d"].address(family)),
        ]


def test_a_port_is_excluded(mesh: _Mesh, pods: dict[str, BedPod], family: str) -> None:
    """Connections to ports of a range are direct, those beside it are captured."""
    for port in (PORT, _OTHER_PORT):
        serve(pods["c"], port)
    mesh.options["a"] = _options(outbound={"exclude_ports": "22,8081-8090"})
    with mesh:
        for client in (pods["a"], pods["b"]):
            for port in (PORT, _OTHER_PORT):
                _fetch(client, pods["c"], family, port)
        seen = [(s.pod, s.original.port) for s in mesh.intercepted()]
        assert seen == [("a", PORT), ("b", PORT), ("b", _OTHER_PORT)]


def test_nothing_but_the_included_is_captured(
    mesh: _Mesh, pods: dict[str, BedPod], family: str
) -> None:
    """Of what is included, the excluded is left out; of the rest nothing is captured."""
    for server in (pods["c"], pods["d"]):
        for port in (PORT, _OTHER_PORT):
            serve(server, port)
    both = f"{_host(pods['c'], family)},{_host(pods['d'], family)}"
    chosen = {"include_cidrs": both, "exclude_cidrs": _host(pods["d"], family)}
    mesh.options["a"] = _options(outbound={**chosen, "include_ports": str(PORT)})
    with mesh:
        for server in (pods["c"], pods["d"]):
            for port in (PORT, _OTHER_PORT):
                _fetch(pods["a"], server, family, port)
        assert [s.original for s in mesh.intercepted()] == [at(pods["c"], family)]


def test_what_comes_in_is_excluded_by_port(
    mesh: _Mesh, pods: dict[str, BedPod], family: str
) -> None:
    """A client reaches the excluded port of a past the proxy; that of b is captured."""
    for server in (pods["a"], pods["b"]):
        serve(server)
    mesh.options["a"] = _options(inbound={"exclude_ports": str(PORT)})
    with mesh:
        for server in (pods["a"], pods["b"]):
            _fetch(pods["c"], server, family)
        assert _reached(mesh) == [("b", INBOUND_PORT)]


def test_what_comes_in_is_excluded_by_client(
    mesh: _Mesh, pods: dict[str, BedPod], family: str
) -> None:
    """Client d is let past the proxy, client c is not."""
    serve(pods["a"])
    mesh.options["a"] = _options(inbound={"exclude_cidrs": _host(pods["d"], family)})
    with mesh:
        for client in (pods["c"], pods["d"]):
            _fetch(client, pods["a"], family)
        assert [s.peer.ip for s in mesh.intercepted()] == [pods["c"].address(family)]


def test_the_mesh_comes_in_all_the_same(mesh: _Mesh, pods: dict[str, BedPod], family: str) -> None:
    """With inbound capture bypassed HBONE reaches the proxy, and what goes out is captured."""
    serve(pods["a"])
    serve(pods["c"])
    mesh.options["a"] = _options(bypass_inbound=True)
    with mesh:
        _fetch(pods["c"], pods["a"], family)
        pods["c"].run(apps.request, at(pods["a"], family, 15008))
        _fetch(pods["a"], pods["c"], family)
        assert _reached(mesh) == [("a", 15008), ("a", OUTBOUND_PORT)]


def test_a_connection_keeps_the_decision_of_its_beginning(
    mesh: _Mesh, pods: dict[str, BedPod], family: str
) -> None:
    """Excluded while captured connections live, and captured again: each goes on as it began."""
    for server in (pods["a"], pods["c"]):
        serve(server)
    a, c = pods["a"], pods["c"]
    with mesh:
        captured = [_hold(a, c, family), _hold(c, a, family)]
        seen = [*[("a", OUTBOUND_PORT)] * 2, *[("a", INBOUND_PORT)] * 2]
        excluded = {"exclude_cidrs": _host(c, family)}
        _change(mesh, a, outbound=excluded, inbound=excluded)
        direct = [_hold(a, c, family), _hold(c, a, family)]
        assert [held.ask("ping") for held in captured + direct] == [{}] * 4
        assert sorted(_reached(mesh)) == sorted(seen)

        _change(mesh, a, outbound={"exclude_ports": "22"})
        assert [held.ask("ping") for held in captured + direct] == [{}] * 4
        _fetch(a, c, family)
        _fetch(c, a, family)
        again = [("a", OUTBOUND_PORT), ("a", INBOUND_PORT)]
        assert sorted(_reached(mesh)) == sorted(seen + again)

        _change(mesh, a)
        _fetch(a, c, family)
        assert sorted(_reached(mesh)) == sorted([*seen, *again, ("a", OUTBOUND_PORT)])
        assert [held.ask("ping") for held in captured + direct] == [{}] * 4
