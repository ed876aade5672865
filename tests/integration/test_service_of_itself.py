"""A pod that calls a service and is itself the endpoint that answers."""

from __future__ import annotations

import pytest

from pyambient.model.address import SocketAddress
from tests.bed import ClientOptions, apps

from .conftest import Pair
from .test_policy import load

VIPS = {"v4": "10.200.0.1", "v6": "fd00:200::1"}
MESH = """
workloads:
- uid: server
  name: server
  namespace: default
  serviceAccount: server
  workloadIps: ["{ipv4}", "{ipv6}"]
  protocol: HBONE
  services: {{"default/self.example": {{8080: 8080}}}}
services:
- name: self
  namespace: default
  hostname: self.example
  vips: ["/10.200.0.1", "/fd00:200::1"]
  ports: {{8080: 8080}}
"""


@pytest.mark.parametrize("backend", ["bpf", "nftables"], scope="module")
def test_a_pod_reaches_itself_by_a_service(pair: Pair, family: str) -> None:
    """The connection goes through a tunnel from the pod to itself, and is answered.

    The proxy's socket was bound to lo, and the kernel reports the answers of an own address by
    the device that has it: the SYN-ACK found no socket.
    """
    server = pair.server
    load(pair, MESH.format(ipv4=server.ipv4, ipv6=server.ipv6))
    with pair.serve(server, 8080):
        vip = SocketAddress(VIPS[family], 8080)
        seen = server.run(apps.request, vip, b"to myself", ClientOptions(timeout=8))
    load(pair, "workloads: []\n")
    assert (seen.errno, seen.data) == (None, b"to myself")
