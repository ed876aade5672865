"""What to show of an enrolled pod."""

from __future__ import annotations

from typing import Any

from .records import Record


def describe(record: Record) -> dict[str, Any]:
    """The record for people and programs, as JSON values."""
    return {
        "netns": record.netns.label,
        "path": record.netns.path,
        "uid": record.pod.uid,
        "name": record.pod.name,
        "namespace": record.pod.namespace,
        "service_account": record.pod.service_account,
        "backend": record.backend,
        "state": record.state.value,
        "addresses": list(record.addresses),
        "options": record.options.to_json(),
        "ports": record.ports._asdict(),
    }
