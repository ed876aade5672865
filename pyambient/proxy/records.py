"""The access-log record of a connection, filled in as its story goes on."""

from __future__ import annotations

import time

from pyambient.model.address import SocketAddress
from pyambient.model.workload import Service, Workload
from pyambient.observe.accesslog import ConnectionRecord

from .worker import PodScope


def outbound_record(
    source: SocketAddress, own: Workload, destination: SocketAddress
) -> ConnectionRecord:
    """What is known of a captured connection before anything is decided."""
    return ConnectionRecord(
        direction="outbound",
        source=source,
        source_workload=own,
        destination=destination,
        started=time.monotonic(),
    )


def inbound_record(
    scope: PodScope, source: SocketAddress, destination: SocketAddress, service: Service | None
) -> ConnectionRecord:
    """What is known of a connection that may go on to an app of this pod."""
    snapshot = scope.worker.view.snapshot
    return ConnectionRecord(
        direction="inbound",
        source=source,
        source_workload=snapshot.workload_by_address(scope.details.network, source.ip),
        destination=destination,
        destination_service=None if service is None else service.hostname,
        destination_workload=scope.workload(),
        started=time.monotonic(),
    )
