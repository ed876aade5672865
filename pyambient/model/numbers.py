"""Numbers that other programs rely on; Istio's own wherever Istio has one.

Everything here is part of the contract with ztunnel, istio-cni or the kernel state of a pod, so
a change breaks a peer or leaves something behind. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

from typing import Final

# Ports inside a pod's network namespace.
OUTBOUND_PORT: Final = 15001
INBOUND_PORT: Final = 15006
HBONE_PORT: Final = 15008
DNS_PORT: Final = 15053
RESERVED_PORTS: Final = (OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT, DNS_PORT)

# Marks, both under MARK_MASK: the proxy's sockets, and "deliver this on lo".
PROXY_MARK: Final = 0x539
LOOPBACK_MARK: Final = 0x111
MARK_MASK: Final = 0xFFF

ROUTE_TABLE: Final = 100
RULE_PRIORITY: Final = 32764
# Metrics in ROUTE_TABLE: the route by lo is preferred to those by each other device, which count
# up from DEVICE_METRIC. Neither is 0, which IPv6 reads as 1024.
LOOPBACK_METRIC: Final = 100
DEVICE_METRIC: Final = 200

# How many addresses of a pod stand for the resolvers that its apps ask (backend "bpf"), and the
# first of each family: of 127.0.0.0/8, and of 100::/64, which RFC 6666 has routers discard.
DNS_SLOT_COUNT: Final = 1024
DNS_SLOTS_V4: Final = "127.53.0.0"
DNS_SLOTS_V6: Final = "100::53:0"

PROBE_ADDRESS_V4: Final = "169.254.7.127"
PROBE_ADDRESS_V6: Final = "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"

# HTTP/2 (RFC 9113).
MAX_FRAME_ACCEPTED: Final = 1 << 20
MAX_FRAME_SENT: Final = 256 << 10
# A stream that has its tunnel to itself; several share it with this much each.
STREAM_WINDOW: Final = 4 << 20
SHARED_STREAM_WINDOW: Final = 1 << 20
# To and from a peer whose round trip is shorter than this, a smaller window is as good, and what
# shares the tunnel waits for less.
NEAR_STREAM_WINDOW: Final = 448 << 10
NEAR_ROUND_TRIP: Final = 0.001
CONNECTION_WINDOW: Final = 16 << 20
MAX_STREAMS_ACCEPTED: Final = 200
MAX_STREAMS_OPENED: Final = 100
MAX_HEADER_LIST: Final = 64 << 10
PING_INTERVAL: Final = 10.0
PING_TIMEOUT: Final = 20.0

CONNECT_TIMEOUT: Final = 10.0
HANDSHAKE_TIMEOUT: Final = 10.0
ANSWER_TIMEOUT: Final = 15.0
OWN_WORKLOAD_TIMEOUT: Final = 5.0
POOL_IDLE_TIMEOUT: Final = 300.0

# DNS (RFC 1035, RFC 7766): what all pods of a proxy may have in flight together, how long an
# answer may take, and how long a connection without a query stays.
RESOLVER_PORT: Final = 53
QUERIES_IN_FLIGHT: Final = 4096
QUERY_TIMEOUT: Final = 5.0
DNS_IDLE_TIMEOUT: Final = 10.0

# Of one proxy (bpf/maps.h).
MAX_WORKERS: Final = 16

DEFAULT_TRUST_DOMAIN: Final = "cluster.local"
