"""Mesh files of one entry, as text: a test changes the key it is about, or leaves it out (None)."""

from __future__ import annotations


def _file(kind: str, given: dict[str, str], changes: dict[str, str | None]) -> str:
    lines = [f"{key}: {value}" for key, value in (given | changes).items() if value is not None]
    return f"{kind}:\n- " + "\n  ".join(lines) + "\n"


def workload(**changes: str | None) -> str:
    given = {"name": "a", "namespace": "ns", "workloadIps": "[10.0.0.1]", "services": "{}"}
    return _file("workloads", given, changes)


def service(**changes: str | None) -> str:
    given = {"name": "a", "namespace": "ns", "hostname": "h", "vips": "[]", "ports": "{}"}
    return _file("services", given, changes)


def policy(match: str = "{}", **changes: str | None) -> str:
    """A policy of one rule, one clause and this match."""
    given = {"name": "a", "namespace": "ns", "scope": "Global", "action": "Allow"}
    return _file("policies", given | {"rules": f"[[[{match}]]]"}, changes)
