"""Header blocks that are read without the HPACK decoder mean the same as with it."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyambient.hbone.errors import RemoteProtocolError
from pyambient.hbone.headers import FieldDecoder, _stateless, encode_answer
from pyambient.hbone.request import ConnectRequest

LIMIT = 64 << 10
TEXT = st.text('abcdefgh=/.,;:"0123456789-', max_size=300)


def by_hpack(block: bytes, limit: int = LIMIT) -> object:
    try:
        return tuple(hpack.Decoder(max_header_list_size=limit).decode(block, raw=True))
    except hpack.HPACKError as error:
        return type(error)


@given(TEXT, TEXT, TEXT, TEXT)
def test_our_own_requests_are_read_without_a_table(authority, baggage, forwarded, trace):
    """Whatever we send is of the simple kind, and both ways of reading it agree."""
    block = ConnectRequest(f"a{authority}", baggage, forwarded, trace).encode()
    fields = _stateless(block, LIMIT)
    assert fields is not None
    assert fields == by_hpack(block)


@given(st.sampled_from([200, 204, 400, 401, 404, 500, 503]), TEXT)
def test_our_own_answers_are_read_without_a_table(status, value):
    """The same for answers, whose status may be one byte."""
    block = encode_answer(status, (("baggage", value),))
    assert _stateless(block, LIMIT) == by_hpack(block)


@given(st.binary(max_size=200))
def test_any_block_is_read_the_same_or_left_to_hpack(block):
    """For arbitrary bytes the answer is hpack's, or none."""
    fields = _stateless(block, LIMIT)
    assert fields is None or fields == by_hpack(block)


@given(st.lists(st.sampled_from([b"\x88", b"\x00\x01a\x01b", b"\x08\x03999"]), max_size=50))
def test_the_size_limit_is_hpacks(parts):
    """A list that is too long for hpack is too long here, counted the same way."""
    block = b"".join(parts)
    for limit in (0, 40, 100, 500):
        fields = _stateless(block, limit)
        assert (fields is None) is (by_hpack(block, limit) is hpack.OversizedHeaderListError)


def test_a_block_with_the_table_still_goes_through_hpack():
    """Indexing fills the connection's table, and a later block may refer to it."""
    decoder = FieldDecoder(LIMIT)
    indexing = b"\x40\x01a\x01b"
    assert decoder.decode(indexing) == ((b"a", b"b"),)
    assert decoder.decode(b"\x88") == ((b":status", b"200"),)
    assert decoder.decode(b"\xbe") == ((b"a", b"b"),)


def test_an_oversized_plain_block_is_refused():
    """The limit holds for blocks of the simple kind, too."""
    with pytest.raises(RemoteProtocolError):
        FieldDecoder(50).decode(b"\x00\x01a\x01b" * 3)
