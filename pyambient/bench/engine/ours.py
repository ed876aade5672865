"""Starts the subject "pyambient": a proxy on each node of a bed."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

from pyambient.bench import proxy
from pyambient.hbone import LocalSettings

from .bed import (
    APP_PORT,
    CLIENT,
    CLIENT_IP,
    NAMESPACE,
    NEIGHBOUR,
    NEIGHBOUR_IP,
    SERVER,
    SERVER_IP,
    SERVER_IP_FOR_NEIGHBOUR,
    SERVER_IP_FOR_STRANGER,
    Bed,
)

_ADDRESSES = {
    CLIENT: (CLIENT_IP,),
    NEIGHBOUR: (NEIGHBOUR_IP,),
    SERVER: (SERVER_IP, SERVER_IP_FOR_NEIGHBOUR, SERVER_IP_FOR_STRANGER),
}
_POLICY = f"""
policies:
- name: known-clients
  namespace: {NAMESPACE}
  scope: WorkloadSelector
  action: Allow
  dryRun: false
  rules:
  - - - principals: [!Exact cluster.local/ns/{NAMESPACE}/sa/client]
        destinationPorts: [{APP_PORT}, {APP_PORT + 1}, {APP_PORT + 2}]
      - principals: [!Exact cluster.local/ns/{NAMESPACE}/sa/neighbour]
"""


def start(
    bed: Bed, http2: LocalSettings, *, nested: bool = False
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """The proxies of node A and node B, listening; `http2` goes for all tunnels.

    `nested` ones have their loop in a trio task.
    """
    mesh = bed.work / "mesh.yaml"
    mesh.write_text("workloads:\n" + "".join(map(_workload, _ADDRESSES)) + _POLICY, "utf-8")
    return (
        _start(bed, (CLIENT, NEIGHBOUR), mesh, http2, nested=nested),
        _start(bed, (SERVER,), mesh, http2, nested=nested),
    )


def _workload(name: str) -> str:
    ips = ", ".join(f'"{ip}"' for ip in _ADDRESSES[name])
    policies = f'["{NAMESPACE}/known-clients"]' if name == SERVER else "[]"
    return (
        f"- name: {name}\n  namespace: {NAMESPACE}\n  serviceAccount: {name}\n"
        f"  workloadIps: [{ips}]\n  protocol: HBONE\n  services: {{}}\n"
        f"  authorizationPolicies: {policies}\n"
    )


def _start(
    bed: Bed, names: tuple[str, ...], mesh: Path, http2: LocalSettings, *, nested: bool
) -> subprocess.Popen[str]:
    pods = [
        {
            "name": name,
            "namespace": NAMESPACE,
            "fd": bed.pods[name].fd,
            "backend": bed.node.interceptor.name,
            "addresses": _ADDRESSES[name],
        }
        for name in names
    ]
    settings = {
        "mesh": str(mesh),
        "ca_dir": str(bed.node.ca_dir),
        "log": str(bed.work / f"{names[0]}.log"),
        "http2": dataclasses.asdict(http2),
        "nested": nested,
        "pods": pods,
    }
    return proxy.start(bed.proxy(names[0]), settings, (bed.pods[name] for name in names))
