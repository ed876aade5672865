"""On which ports the proxy listens inside one pod."""

from __future__ import annotations

from typing import NamedTuple

from .numbers import DNS_PORT, HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, RESERVED_PORTS


class Ports(NamedTuple):
    """The well-known ports, or what stands for them in a pod where somebody else has one.

    That concerns the inside of the pod alone: for every other pod HBONE stays on 15008. The order
    is that of RESERVED_PORTS. `dns` is a port of both TCP and UDP.
    """

    outbound: int = OUTBOUND_PORT
    inbound: int = INBOUND_PORT
    hbone: int = HBONE_PORT
    dns: int = DNS_PORT

    @property
    def moved(self) -> dict[int, int]:
        """{well-known port: what stands for it}, of those that are not themselves."""
        pairs = zip(RESERVED_PORTS, self, strict=True)
        return {well_known: port for well_known, port in pairs if well_known != port}

    @property
    def loops(self) -> tuple[int, ...]:
        """A connection to one of these would come straight back (ztunnel's "illegal ports")."""
        return (self.outbound, self.inbound, self.hbone)


WELL_KNOWN = Ports()
