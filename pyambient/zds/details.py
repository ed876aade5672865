"""What ZDS cannot say: our own second channel between agent and proxy, as JSON packets.

One packet of a SOCK_SEQPACKET socket is one JSON object. The agent asks, the proxy answers; an
answer repeats the question's `id`, so a drain that takes its time holds nothing else up. A proxy
of another make never connects here, and is served by ZDS alone.

    {"id": 1, "describe": "<uid>", "details": {"backend": "bpf", "addresses": [...], "network": "",
                                               "dns": {"bpffs": "...", "netns_cookie": 1},
                                               "ports": [15001, 15006, 15008, 15053]}}
    {"id": 2, "drain": "<uid>", "timeout": 30.0}
    {"id": 3, "status": "<uid>"}
    {"id": 4, "explain": "<uid>", "to": ["10.77.0.3", 8080], "source": "10.77.0.4"}
    {"id": 5, "settle": "<uid>", "timeout": 30.0}
    {"id": 3, "result": ...}    or    {"id": 3, "error": "one line"}
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Final

from pyambient.model.address import SocketAddress
from pyambient.model.ports import WELL_KNOWN, Ports

# An address takes under 50 bytes: room for a thousand of them, and bounded.
PACKET_LIMIT: Final = 64 << 10


class DetailsError(Exception):
    """The other end sent something that is no message of this channel."""


@dataclass(frozen=True, slots=True)
class DnsCapture:
    """That a pod's DNS is captured; with backend `bpf` also where its resolvers are noted."""

    bpffs: str = ""
    netns_cookie: int = 0


@dataclass(frozen=True, slots=True)
class PodDetails:
    """How a pod is intercepted, and its own addresses in canonical text.

    `dns` is None if its DNS is not captured. `ports` are those to listen on.
    """

    backend: str
    addresses: tuple[str, ...]
    network: str = ""
    dns: DnsCapture | None = None
    ports: Ports = WELL_KNOWN


@dataclass(frozen=True, slots=True)
class Describe:
    """Sent before the pod's ZDS Add, and again whenever its details change."""

    uid: str
    details: PodDetails


@dataclass(frozen=True, slots=True)
class Drain:
    """Accept no more for this pod and wait; the result is the number of connections left.

    `timeout` is in seconds.
    """

    uid: str
    timeout: float


@dataclass(frozen=True, slots=True)
class Status:
    """The result is an object for people."""

    uid: str


@dataclass(frozen=True, slots=True)
class Explain:
    """What the proxy would do to a connection; the result is an `Explanation` as JSON, or null.

    `source` is the address of a client that connects to the pod; empty for one of the pod's apps.
    """

    uid: str
    to: SocketAddress
    source: str = ""


@dataclass(frozen=True, slots=True)
class Settle:
    """Wait until the pod's present connections have ended, and go on accepting.

    The result is the number of those that are left after `timeout` seconds.
    """

    uid: str
    timeout: float


Question = Describe | Drain | Status | Settle | Explain


@dataclass(frozen=True, slots=True)
class Answer:
    """The proxy's answer to question `id`; `error` is empty when `result` counts."""

    id: int
    result: Any = None
    error: str = ""


def encode_question(number: int, question: Question) -> bytes:
    match question:
        case Describe(uid, details):
            fields: dict[str, Any] = {"describe": uid, "details": _details_fields(details)}
        case Drain(uid, timeout):
            fields = {"drain": uid, "timeout": timeout}
        case Settle(uid, timeout):
            fields = {"settle": uid, "timeout": timeout}
        case Status(uid):
            fields = {"status": uid}
        case Explain(uid, to, source):
            fields = {"explain": uid, "to": list(to), "source": source}
    return _encode({"id": number, **fields})


def _details_fields(details: PodDetails) -> dict[str, Any]:
    dns = details.dns
    return {
        "backend": details.backend,
        "addresses": list(details.addresses),
        "network": details.network,
        "dns": None if dns is None else dataclasses.asdict(dns),
        "ports": list(details.ports),
    }


def decode_question(packet: bytes) -> tuple[int, Question]:
    """The question and the id its answer must repeat."""
    match _decode(packet):
        case {
            "id": int(number),
            "describe": str(uid),
            "details": {"backend": str(backend), "addresses": [*addresses], **more},
        }:
            texts = tuple(str(address) for address in addresses)
            network, dns = str(more.get("network", "")), _dns_capture(more.get("dns"))
            ports = _ports(more.get("ports", list(WELL_KNOWN)))
            return number, Describe(uid, PodDetails(backend, texts, network, dns, ports))
        case {"id": int(number), "drain": str(uid), "timeout": int() | float() as timeout}:
            return number, Drain(uid, float(timeout))
        case {"id": int(number), "settle": str(uid), "timeout": int() | float() as timeout}:
            return number, Settle(uid, float(timeout))
        case {"id": int(number), "status": str(uid)}:
            return number, Status(uid)
        case {
            "id": int(number),
            "explain": str(uid),
            "to": [str(ip), int(port)],
            "source": str(source),
        }:
            return number, Explain(uid, SocketAddress(ip, port), source)
    raise DetailsError("a packet that asks nothing known")


def _dns_capture(fields: Any) -> DnsCapture | None:
    match fields:
        case None:
            return None
        case {"bpffs": str(bpffs), "netns_cookie": int(cookie)}:
            return DnsCapture(bpffs, cookie)
    raise DetailsError("a packet that says nothing known of DNS")


def _ports(numbers: Any) -> Ports:
    match numbers:
        case [int(), int(), int(), int()] if all(0 < number < 1 << 16 for number in numbers):
            return Ports(*numbers)
    raise DetailsError("a packet that says nothing known of ports")


def encode_answer(answer: Answer) -> bytes:
    if answer.error:
        return _encode({"id": answer.id, "error": answer.error})
    return _encode({"id": answer.id, "result": answer.result})


def decode_answer(packet: bytes) -> Answer:
    match _decode(packet):
        case {"id": int(number), "error": str(error)}:
            return Answer(number, error=error)
        case {"id": int(number), "result": result}:
            return Answer(number, result)
    raise DetailsError("a packet that answers nothing")


def _encode(message: dict[str, Any]) -> bytes:
    packet = json.dumps(message, separators=(",", ":")).encode()
    if len(packet) > PACKET_LIMIT:
        raise DetailsError(f"a message of {len(packet)} bytes, the limit is {PACKET_LIMIT}")
    return packet


def _decode(packet: bytes) -> Any:
    if len(packet) > PACKET_LIMIT:
        raise DetailsError("a packet longer than the limit")
    try:
        return json.loads(packet)
    except (ValueError, RecursionError):
        raise DetailsError("a packet that is not JSON") from None
