"""`--same-node direct` where pods of one node have the same addresses."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyambient.model.address import SocketAddress
from tests.bed import Bed, ClientOptions, Mesh, apps, capturing

from .conftest import assert_all_tunnelled

_MARKER = b"plaintext that must not be on the wire"


@pytest.mark.parametrize("backend", ["bpf", "nftables"], scope="module")
def test_pods_with_one_address_are_reached_by_tunnel(
    bed: Bed, tmp_path: Path, backend: str, family: str
) -> None:
    """By the address alone nobody could say which of them is meant; the network can."""
    with Mesh(bed, tmp_path, options=("--same-node=direct",)) as mesh:
        twins = bed.twin_networks()
        for twin in twins:
            mesh.enroll(twin.pod, service_account="server", backend=backend)
            mesh.enroll(twin.peer, service_account="client", backend=backend)
        servers = [twin.pod.spawn(apps.echo_server, 8080) for twin in twins]
        assert [server.receive() for server in servers] == ["listening"] * 2
        there = SocketAddress(twins[0].pod.address(family), 8080)
        for twin, asked in zip(twins, ([1, 0], [1, 1]), strict=True):
            with capturing(twin.peer) as capture:
                assert twin.peer.run(apps.request, there, _MARKER).data == _MARKER
            assert_all_tunnelled(capture, twin.peer, twin.pod, _MARKER)
            assert [len(server.ask("accepted")) for server in servers] == asked
        mesh.unenroll(twins[0].pod)
        assert twins[0].peer.run(apps.request, there, _MARKER, ClientOptions(timeout=8)).failed
        assert [len(server.ask("accepted")) for server in servers] == [1, 1]
