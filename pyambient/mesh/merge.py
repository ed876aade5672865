"""Enrolled pods and the workloads of a mesh file become one list; the file wins.

General theory of operation
---------------------------
The file is written by whoever runs the mesh, an enrolment by whoever runs a pod. A workload of the
file stands for an enrolled pod if it has its uid or, in the same network, one of its addresses: the
pod is then what the file says it is, with the addresses of both, and is found by either uid.

A workload stands for one pod at most, and plain network namespaces reuse addresses: several pods of
one node may have the one that the file names. Then the pod is meant that fits best (uid, identity,
name), and the others keep entries of their own, which are found by uid but not by that address.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyambient.model.workload import TunnelProtocol, Workload


@dataclass(frozen=True, slots=True)
class Merged:
    """All workloads, the one that wins an address first; and what there is to say about it.

    `also_known_as` leads from an enrolled pod's uid to the entry that stands for it. `conflicts`
    are those where file and enrolment disagree, `matches` those where they do not.
    """

    workloads: tuple[Workload, ...]
    also_known_as: dict[str, Workload]
    conflicts: tuple[str, ...]
    matches: tuple[str, ...]


def merge(described: Sequence[Workload], enrolled: Sequence[Workload], source: str) -> Merged:
    """Merge the workloads `described` in the file `source` with the `enrolled` pods."""
    claims = _claims(described, enrolled)
    claimed = {pod.uid for pod in claims.values()}
    taken = {(w.network, ip) for w in described for ip in w.addresses}
    entries = [_entry(w, claims.get(w.uid), taken) for w in described]
    also_known_as = {claims[e.uid].uid: e for e in entries if e.uid in claims}
    rest = sorted((pod for pod in enrolled if pod.uid not in claimed), key=lambda pod: pod.uid)
    said = [_remark(w, claims[w.uid], source) for w in described if w.uid in claims]
    return Merged(
        (*sorted(entries, key=_precedence), *rest),
        also_known_as,
        tuple(remark for remark, differ in said if differ),
        tuple(remark for remark, differ in said if not differ),
    )


def _precedence(workload: Workload) -> tuple[bool, bool]:
    """Order where an address is shared, as in ztunnel: pods first, then what speaks HBONE."""
    return ("//Pod/" not in workload.uid, workload.protocol is not TunnelProtocol.HBONE)


def _claims(described: Sequence[Workload], enrolled: Sequence[Workload]) -> dict[str, Workload]:
    """Which pod each workload of the file stands for, by the workload's uid; best fits first."""
    claims: dict[str, Workload] = {}
    claimed: set[str] = set()
    pairs = sorted(_pairs(described, enrolled), key=lambda pair: _misfit(*pair))
    for workload, pod in pairs:
        if workload.uid not in claims and pod.uid not in claimed:
            claims[workload.uid] = pod
            claimed.add(pod.uid)
    return claims


def _pairs(
    described: Sequence[Workload], enrolled: Sequence[Workload]
) -> Iterator[tuple[Workload, Workload]]:
    """Workloads and pods with the same uid or address."""
    by_uid = {w.uid: w for w in described}
    holders: dict[tuple[str, str], list[Workload]] = {}
    for workload in described:
        for ip in () if workload.host_network else workload.addresses:
            holders.setdefault((workload.network, ip), []).append(workload)
    for pod in enrolled:
        if pod.uid in by_uid:
            yield by_uid[pod.uid], pod
        for ip in pod.addresses:
            for workload in holders.get((pod.network, ip), ()):
                yield workload, pod


def _misfit(workload: Workload, pod: Workload) -> tuple[bool, bool, bool, str]:
    return (
        workload.uid != pod.uid,
        workload.identity != pod.identity,
        workload.name != pod.name,
        pod.uid,
    )


def _entry(workload: Workload, pod: Workload | None, taken: set[tuple[str, str]]) -> Workload:
    """What the file says, with those addresses of the pod that the file gives to no one else."""
    if pod is None:
        return workload
    found = tuple(ip for ip in pod.addresses if (workload.network, ip) not in taken)
    return dataclasses.replace(workload, addresses=workload.addresses + found)


def _remark(workload: Workload, pod: Workload, source: str) -> tuple[str, bool]:
    """One line about a claim, and whether the two disagree."""
    pairs = (
        ("identity", workload.identity, pod.identity),
        ("protocol", workload.protocol.value, pod.protocol.value),
        ("network", repr(workload.network), repr(pod.network)),
    )
    differ = [
        f"{what} {theirs} instead of {ours}" for what, theirs, ours in pairs if theirs != ours
    ]
    head = f"workload {workload} of {source} stands for enrolled pod {pod}"
    return (f"{head} and wins: {', '.join(differ)}" if differ else head), bool(differ)
