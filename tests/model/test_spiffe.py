"""SPIFFE ids of Istio's shape, and nothing else."""

from __future__ import annotations

import pytest

from pyambient.model.spiffe import SpiffeId
from pyambient.model.workload import PodRef

URI = "spiffe://cluster.local/ns/default/sa/client"


def test_parse_and_print():
    """An id prints as it was parsed; its principal is the form of policies."""
    identity = SpiffeId.parse(URI)
    assert identity == SpiffeId("cluster.local", "default", "client")
    assert str(identity) == URI
    assert identity.principal == "cluster.local/ns/default/sa/client"


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "cluster.local/ns/default/sa/client",
        "spiffe://cluster.local",
        "spiffe://cluster.local/ns/default/sa/",
        "spiffe:///ns/default/sa/client",
        "spiffe://cluster.local/ns//sa/client",
        "spiffe://Cluster.local/ns/default/sa/client",
        "spiffe://cluster.local/ns/default/sa/client/",
        "spiffe://cluster.local/ns/default/sa/client?x",
        "spiffe://cluster.local/sa/client/ns/default",
        "spiffe://cluster.local/ns/a/sa/b/ns/c/sa/d",
        "SPIFFE://cluster.local/ns/default/sa/client",
        "https://cluster.local/ns/default/sa/client",
        URI + "\n",
    ],
)
def test_other_shapes(uri):
    """Any other URI is a ValueError."""
    with pytest.raises(ValueError, match="is not spiffe://"):
        SpiffeId.parse(uri)


def test_identity_of_a_pod():
    """A pod's identity follows from what ZDS carries about it."""
    pod = PodRef("uid", "client-1", "default", "client")
    assert str(pod.identity("cluster.local")) == URI
    assert str(pod) == "default/client-1"
