"""ZDS messages as values, and their bytes (istio.workload.zds, `zds.proto`).

One message is one packet of a SOCK_SEQPACKET socket. Both of Istio's ends read into 1024 bytes
and take a longer packet for an error, so nothing longer is ever encoded here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from pyambient.model.workload import PodRef

from . import zds_pb2

# A packet must be shorter than this: a full buffer could be a truncated message.
BUFFER_SIZE: Final = 1024
_ACK_OVERHEAD: Final = 16
_VERSION: Final = 1


class ZdsError(Exception):
    """The other end broke the protocol; the connection cannot go on."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The proxy's first packet."""

    version: int = _VERSION


@dataclass(frozen=True, slots=True)
class Add:
    """Serve this pod; the packet carries the pod's network namespace as its one fd."""

    pod: PodRef


@dataclass(frozen=True, slots=True)
class Keep:
    """Go on serving a pod whose network namespace the agent no longer holds."""

    uid: str


@dataclass(frozen=True, slots=True)
class Del:
    uid: str


@dataclass(frozen=True, slots=True)
class SnapshotSent:
    """Every pod of the node was named: the proxy stops serving the others."""


@dataclass(frozen=True, slots=True)
class Ack:
    """The answer to one request; `error` is empty when it was carried out."""

    error: str = ""


Request = Add | Keep | Del | SnapshotSent


def encode_hello(hello: Hello) -> bytes:
    return bytes(zds_pb2.ZdsHello(version=zds_pb2.Version.Name(hello.version)).SerializeToString())


def decode_hello(packet: bytes) -> Hello:
    hello = zds_pb2.ZdsHello()
    _parse(hello, packet)
    if hello.version != _VERSION:
        raise ZdsError(f"unsupported ZDS version {int(hello.version)}")
    return Hello(int(hello.version))


def encode_request(request: Request) -> bytes:
    """The packet of `request`; ZdsError if it would not fit the other end's buffer."""
    packet = bytes(_request_message(request).SerializeToString())
    if len(packet) >= BUFFER_SIZE:
        raise ZdsError(f"{request} takes {len(packet)} bytes, ZDS has {BUFFER_SIZE - 1}")
    return packet


def _request_message(request: Request) -> zds_pb2.WorkloadRequest:
    match request:
        case Add(pod):
            info = zds_pb2.WorkloadInfo(
                name=pod.name, namespace=pod.namespace, service_account=pod.service_account
            )
            add = zds_pb2.AddWorkload(uid=pod.uid, workload_info=info)
            return zds_pb2.WorkloadRequest(add=add)
        case Keep(uid):
            return zds_pb2.WorkloadRequest(keep=zds_pb2.KeepWorkload(uid=uid))
        case Del(uid):
            # `del` is a Python keyword, so the field is out of reach for plain syntax.
            message = zds_pb2.WorkloadRequest()
            getattr(message, "del").uid = uid
            return message
        case SnapshotSent():
            return zds_pb2.WorkloadRequest(snapshot_sent=zds_pb2.SnapshotSent())


def decode_request(packet: bytes) -> Request:
    """The request in `packet`; ZdsError if there is none, or an Add without workload_info."""
    message = zds_pb2.WorkloadRequest()
    _parse(message, packet)
    match message.WhichOneof("payload"):
        case "add":
            return _add(message.add)
        case "keep":
            return Keep(message.keep.uid)
        case "del":
            return Del(getattr(message, "del").uid)
        case "snapshot_sent":
            return SnapshotSent()
    raise ZdsError("a request without a known payload")


def _add(add: zds_pb2.AddWorkload) -> Add:
    if not add.HasField("workload_info"):
        raise ZdsError(f"the Add of {add.uid!r} has no workload_info")
    info = add.workload_info
    return Add(PodRef(add.uid, info.name, info.namespace, info.service_account))


def encode_ack(ack: Ack) -> bytes:
    """The packet of `ack`, its error cut to what the other end's buffer takes."""
    error = ack.error.encode()[: BUFFER_SIZE - _ACK_OVERHEAD].decode(errors="ignore")
    response = zds_pb2.WorkloadResponse(ack=zds_pb2.Ack(error=error))
    return bytes(response.SerializeToString())


def decode_ack(packet: bytes) -> Ack:
    message = zds_pb2.WorkloadResponse()
    _parse(message, packet)
    if message.WhichOneof("payload") != "ack":
        raise ZdsError("a response without an ack")
    return Ack(message.ack.error)


def _parse(
    message: zds_pb2.ZdsHello | zds_pb2.WorkloadRequest | zds_pb2.WorkloadResponse, packet: bytes
) -> None:
    if len(packet) >= BUFFER_SIZE:
        raise ZdsError(f"a packet of {len(packet)} bytes or more")
    try:
        message.ParseFromString(packet)
    except DecodeError:
        raise ZdsError(f"a packet that is no {type(message).__name__}") from None
