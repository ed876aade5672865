"""What `explain` says of a pod that was left alone by agent and proxy."""

from __future__ import annotations

import json
from typing import Any

from pyambient.model.address import SocketAddress
from tests.bed import ClientOptions, apps

from .conftest import Pair


def explained(pair: Pair, to: SocketAddress) -> dict[str, Any]:
    return dict(json.loads(pair.mesh.cli("explain", "client", str(to), "-o", "json").stdout))


def test_without_agent_and_proxy_it_says_what_it_can(strangers: Pair, family: str) -> None:
    """What is left in the kernel: connections are refused, and so it is said."""
    strangers.enroll()
    to = SocketAddress(strangers.server.address(family), 8080)
    strangers.mesh.kill()
    said = explained(strangers, to)
    assert said["outcome"] == "refused"
    assert "no proxy serves the pod" in said["summary"]
    assert (
        strangers.client.run(apps.request, to, options=ClientOptions(timeout=8)).stage == "connect"
    )
    own = SocketAddress(strangers.client.address(family), 8080)
    assert explained(strangers, own)["outcome"] == "direct"
    strangers.mesh.start()
