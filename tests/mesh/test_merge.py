"""Enrolled pods and the workloads of the file: who stands for whom."""

from __future__ import annotations

import pytest

from pyambient.mesh.merge import merge
from pyambient.model.workload import TunnelProtocol
from tests.mesh.build import spiffe, workload

NODE = {"uid": "u1", "service_account": "server"}
POD = workload("netns-b", "10.0.0.2", "fd00::2", **NODE)
DESCRIBED = workload("server", "10.0.0.2", canonical_name="web")


def test_no_conflict():
    """Pods and workloads that have nothing in common stand side by side, the file's first."""
    other = workload("other", "10.0.0.9")
    merged = merge([other], [POD], "mesh.yaml")
    assert merged.workloads == (other, POD)
    assert (merged.also_known_as, merged.conflicts, merged.matches) == ({}, (), ())


@pytest.mark.parametrize(
    "described",
    [DESCRIBED, workload("server", uid="u1"), workload("server", "fd00::2")],
)
def test_one_entry(described):
    """A workload of the same uid or address stands for the pod, with the addresses of both."""
    merged = merge([described], [POD], "mesh.yaml")
    [entry] = merged.workloads
    assert entry.name == "server"
    assert set(entry.addresses) == set(POD.addresses)
    assert merged.also_known_as == {"u1": entry}
    assert merged.conflicts == ()
    assert merged.matches == (
        "workload default/server of mesh.yaml stands for enrolled pod default/netns-b",
    )


@pytest.mark.parametrize(
    ("described", "difference"),
    [
        (
            workload("server", "10.0.0.2", service_account="other"),
            f"identity {spiffe('other')} instead of {spiffe('server')}",
        ),
        (
            workload("server", "10.0.0.2", protocol=TunnelProtocol.NONE),
            "protocol TCP instead of HBONE",
        ),
        (workload("server", uid="u1", network="net"), "network 'net' instead of ''"),
    ],
)
def test_conflict(described, difference):
    """Where the two disagree the file wins, and that is said with the difference."""
    merged = merge([described], [POD], "mesh.yaml")
    assert merged.also_known_as["u1"].identity == described.identity
    assert merged.also_known_as["u1"].protocol is described.protocol
    assert merged.matches == ()
    said = "workload default/server of mesh.yaml stands for enrolled pod default/netns-b and wins: "
    assert merged.conflicts == (said + difference,)


def test_other_network():
    """The same address in another network is another workload's."""
    merged = merge([workload("server", "10.0.0.2", network="far")], [POD], "mesh.yaml")
    assert merged.also_known_as == {}
    assert len(merged.workloads) == 2


def test_host_network():
    """A host-network workload has the node's address, and never stands for a pod."""
    merged = merge([workload("agent", "10.0.0.2", host_network=True)], [POD], "mesh.yaml")
    assert merged.also_known_as == {}


TWIN = workload("netns-c", "10.0.0.2", uid="u0", service_account="twin")


@pytest.mark.parametrize(
    ("described", "meant"),
    [
        (workload("server", "10.0.0.2"), "u1"),
        (workload("twin", "10.0.0.2"), "u0"),
        (workload("x", "10.0.0.2", uid="u1"), "u1"),
        (workload("twin", "10.0.0.2", uid="u1"), "u1"),
        (workload("netns-c", "10.0.0.2", service_account="twin"), "u0"),
        (workload("stranger", "10.0.0.2"), "u0"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_two_pods_of_one_address(described, meant, order):
    """Of two pods with the address, the file means the one that fits best; the other stays."""
    merged = merge([described], [POD, TWIN][::order], "mesh.yaml")
    assert list(merged.also_known_as) == [meant]
    assert [w.uid for w in merged.workloads[1:]] == [{"u0": "u1", "u1": "u0"}[meant]]


def test_two_pods_of_one_identity():
    """Of two pods with one address and one identity, the one with the workload's name is meant."""
    replica = workload("replica", "10.0.0.2", uid="u9", service_account="server")
    described = workload("replica", "10.0.0.2", service_account="server")
    assert list(merge([described], [POD, replica], "mesh.yaml").also_known_as) == ["u9"]


def test_two_workloads_for_one_pod():
    """A pod has one entry that stands for it, whatever else has one of its addresses."""
    by_v4, by_v6 = workload("server", "10.0.0.2"), workload("other", "fd00::2")
    merged = merge([by_v6, by_v4], [POD], "mesh.yaml")
    assert merged.also_known_as["u1"].name == "server"
    assert {w.name: w.addresses for w in merged.workloads} == {
        "server": ("10.0.0.2",),
        "other": ("fd00::2",),
    }


def test_order_of_the_file():
    """Where workloads of the file share an address, pods come first, then what speaks HBONE."""
    plain = TunnelProtocol.NONE
    vm = workload("vm", "10.0.0.9", uid="Kubernetes/x/WorkloadEntry/ns/vm")
    vm_plain = workload("vm2", "10.0.0.9", uid="Kubernetes/x/WorkloadEntry/ns/vm2", protocol=plain)
    pod_plain = workload("pod2", "10.0.0.9", protocol=plain)
    pod = workload("pod", "10.0.0.9")
    merged = merge([vm_plain, vm, pod_plain, pod], [], "mesh.yaml")
    assert [w.name for w in merged.workloads] == ["pod", "pod2", "vm", "vm2"]
