"""ZDS on the wire: the bytes of ztunnel and istio-cni, in both directions."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyambient.model.workload import PodRef
from pyambient.zds.messages import (
    Ack,
    Add,
    Del,
    Hello,
    Keep,
    Request,
    SnapshotSent,
    ZdsError,
    decode_ack,
    decode_hello,
    decode_request,
    encode_ack,
    encode_hello,
    encode_request,
)

POD = PodRef("u1", "shop-1", "default", "shop")

REQUESTS = [
    (Add(POD), "0a1d 0a027531 1217 0a0673686f702d31 120764656661756c74 1a0473686f70"),
    (Keep("u1"), "2a04 0a027531"),
    (Del("u1"), "1204 12027531"),
    (SnapshotSent(), "1a00"),
]


@pytest.mark.parametrize(("request_", "wire"), REQUESTS)
def test_requests_have_istios_bytes(request_: Request, wire: str) -> None:
    """Each request is encoded and decoded as istio-cni and ztunnel do, DelWorkload.uid as 2."""
    packet = bytes.fromhex(wire)
    assert encode_request(request_) == packet
    assert decode_request(packet) == request_


def test_hello_is_version_one() -> None:
    """The proxy's hello is 08 01."""
    assert encode_hello(Hello()) == b"\x08\x01"
    assert decode_hello(b"\x08\x01") == Hello()


@pytest.mark.parametrize("packet", [b"", b"\x08\x00", b"\x08\x02", b"\xff"])
def test_other_hellos_are_refused(packet: bytes) -> None:
    """A peer of another version, or none, cannot be served."""
    with pytest.raises(ZdsError):
        decode_hello(packet)


@pytest.mark.parametrize(
    ("ack", "wire"), [(Ack(), b"\x0a\x00"), (Ack("no"), b"\x0a\x04\x0a\x02no")]
)
def test_acks_have_ztunnels_bytes(ack: Ack, wire: bytes) -> None:
    """An ack is 0a 00, with the error inside when there is one."""
    assert encode_ack(ack) == wire
    assert decode_ack(wire) == ack


@pytest.mark.parametrize("packet", [b"", b"\x12\x00", b"\x0a\x05", b"\x08\x01"])
def test_what_is_no_ack_is_refused(packet: bytes) -> None:
    """A response without an ack would shift all later ones."""
    with pytest.raises(ZdsError):
        decode_ack(packet)


@pytest.mark.parametrize(
    "packet",
    [b"", b"\x0a\x04\x0a\x02u1", b"\x22\x00", b"\x0a\x7f", b"\x1a\x00" + b"\0" * 1022],
    ids=["empty", "add-without-info", "unknown-payload", "cut-off", "too-long"],
)
def test_what_is_no_request_is_refused(packet: bytes) -> None:
    """Nothing is done for a packet that is not exactly a request."""
    with pytest.raises(ZdsError):
        decode_request(packet)


def test_the_longest_kubernetes_names_fit() -> None:
    """Three names of 253 characters and a uid stay below the 1024 bytes both ends read."""
    pod = PodRef("0" * 36, "n" * 253, "s" * 253, "a" * 253)
    assert len(encode_request(Add(pod))) < 1024


def test_no_longer_request_is_ever_sent() -> None:
    """A request that the other end would cut off is an error here, not there."""
    with pytest.raises(ZdsError, match="1023"):
        encode_request(Add(PodRef("u1", "n" * 1000, "default", "shop")))


def test_a_long_error_is_cut_to_fit() -> None:
    """An ack is always sent; its text gives way, between two characters."""
    packet = encode_ack(Ack("ü" * 2000))
    assert len(packet) < 1024
    assert set(decode_ack(packet).error) == {"ü"}


@given(st.binary(max_size=1200))
def test_any_bytes_are_a_message_or_an_error(packet: bytes) -> None:
    """Decoders raise nothing but their own error, whatever comes."""
    for decode in (decode_hello, decode_request, decode_ack):
        with contextlib.suppress(ZdsError):
            decode(packet)


@given(st.text(max_size=50), st.text(max_size=50), st.text(max_size=50))
def test_any_text_comes_back(uid: str, name: str, error: str) -> None:
    """What is encoded is decoded as it was, empty and foreign text included."""
    for request in (Add(PodRef(uid, name, error, name)), Keep(uid), Del(uid)):
        assert decode_request(encode_request(request)) == request
    assert decode_ack(encode_ack(Ack(error))) == Ack(error)
