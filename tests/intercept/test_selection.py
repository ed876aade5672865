"""Which connections a selection captures: a table, and the same from what the BPF map holds."""

from __future__ import annotations

import itertools
import struct

import pytest

from pyambient.errors import UsageError
from pyambient.intercept.selection import EVERYTHING, PortRange, Selection
from pyambient.intercept.selection_map import entries
from pyambient.model.address import packed_ip

_SELECTIONS = {
    "nothing said": {},
    "a port": {"exclude_ports": "22"},
    "ranges that touch": {"exclude_ports": "8000-8099,8100,9000-9999"},
    "all ports but some": {"include_ports": "80,443,8000-8100"},
    "both kinds of ports": {
        "include_ports": "8000-8100",
        "exclude_ports": "8050,8090-9000",
    },
    "a network": {"exclude_cidrs": "10.0.0.0/8,fd00::/8"},
    "an address": {"exclude_cidrs": "10.1.2.3,fd00::1"},
    "one family": {"exclude_cidrs": "0.0.0.0/0"},
    "everything": {"exclude_cidrs": "0.0.0.0/0,::/0"},
    "just a network": {"include_cidrs": "10.0.0.0/8"},
    "a hole in a network": {"include_cidrs": "10.0.0.0/8", "exclude_cidrs": "10.1.0.0/16"},
    "within a hole": {
        "include_cidrs": "10.0.0.0/8,10.1.2.0/24",
        "exclude_cidrs": "10.1.0.0/16,10.1.2.0/25",
    },
    "the same in both": {"include_cidrs": "10.1.0.0/16", "exclude_cidrs": "10.1.0.0/16"},
    "ports and networks": {
        "include_cidrs": "10.0.0.0/8,fd00::/8",
        "exclude_cidrs": "fd00::/64",
        "include_ports": "1-1023",
        "exclude_ports": "22",
    },
}
_IPS = ("10.0.0.1", "10.1.2.3", "10.1.2.200", "11.0.0.1", "fd00::1", "fd00:0:0:1::1", "2001:db8::1")
_PORTS = (1, 22, 80, 443, 1023, 1024, 8000, 8050, 8090, 8100, 8101, 9000, 9001, 65535)


@pytest.mark.parametrize(
    ("which", "ip", "port", "captured"),
    [
        ("nothing said", "10.0.0.1", 22, True),
        ("a port", "10.0.0.1", 22, False),
        ("a port", "fd00::1", 23, True),
        ("ranges that touch", "10.0.0.1", 8100, False),
        ("ranges that touch", "10.0.0.1", 8101, True),
        ("all ports but some", "10.0.0.1", 8050, True),
        ("all ports but some", "fd00::1", 81, False),
        ("both kinds of ports", "10.0.0.1", 8000, True),
        ("both kinds of ports", "10.0.0.1", 8050, False),
        ("both kinds of ports", "10.0.0.1", 8100, False),
        ("a network", "10.1.2.3", 80, False),
        ("a network", "11.0.0.1", 80, True),
        ("a network", "fd00::1", 80, False),
        ("an address", "10.1.2.3", 80, False),
        ("an address", "10.0.0.1", 80, True),
        ("one family", "10.0.0.1", 80, False),
        ("one family", "fd00::1", 80, True),
        ("just a network", "10.0.0.1", 80, True),
        ("just a network", "11.0.0.1", 80, False),
        ("just a network", "fd00::1", 80, False),
        ("a hole in a network", "10.0.0.1", 80, True),
        ("a hole in a network", "10.1.2.3", 80, False),
        ("within a hole", "10.1.2.200", 80, False),
        ("the same in both", "10.1.2.3", 80, False),
        ("ports and networks", "10.0.0.1", 80, True),
        ("ports and networks", "10.0.0.1", 22, False),
        ("ports and networks", "fd00::1", 80, False),
        ("ports and networks", "fd00:0:0:1::1", 80, True),
        ("ports and networks", "2001:db8::1", 80, False),
    ],
)
def test_a_connection_is_captured_or_not(which: str, ip: str, port: int, captured: bool) -> None:  # noqa: FBT001 - a column
    """Included and not excluded, by port and by address."""
    assert Selection.from_json(_SELECTIONS[which]).captures(ip, port) is captured


def _looked_up(trie: dict[bytes, bytes], kind: int, value: bytes) -> bool:
    """What the kernel's trie answers: the value of the longest prefix, 1 where it excludes."""
    for bits in range(8 * len(value), -1, -1):
        masked = int.from_bytes(value, "big") >> (8 * len(value) - bits) << (8 * len(value) - bits)
        prefix = masked.to_bytes(len(value), "big")
        if found := trie.get(struct.pack("=II16s", 32 + bits, kind, prefix)):
            return found == b"\1"
    return False


@pytest.mark.parametrize("which", _SELECTIONS)
def test_the_map_says_the_same(which: str) -> None:
    """The most specific entry of the trie decides as the selection does, everywhere."""
    selection = Selection.from_json(_SELECTIONS[which])
    trie = dict(entries(selection))
    for ip, port in itertools.product(_IPS, _PORTS):
        family, packed = (6, packed_ip(ip)) if ":" in ip else (4, packed_ip(ip)[12:])
        excluded = _looked_up(trie, 0, port.to_bytes(2, "big")) or _looked_up(trie, family, packed)
        assert excluded is not selection.captures(ip, port), (ip, port)


def test_entries_are_few() -> None:
    """A range of ports takes aligned blocks, and what an exclusion covers takes nothing."""
    most = dict(entries(Selection.from_json({"exclude_ports": "1-65534"})))
    covered = {"include_cidrs": "10.1.0.0/16,10.2.0.0/16", "exclude_cidrs": "10.0.0.0/8"}
    assert len(most) == 30
    assert len(dict(entries(Selection.from_json(covered)))) == 3


@pytest.mark.parametrize("which", _SELECTIONS)
def test_a_selection_survives_the_record(which: str) -> None:
    """Written as text and read back, it is equal."""
    selection = Selection.from_json(_SELECTIONS[which])
    assert Selection.from_json(selection.to_json()) == selection


def test_lists_are_kept_in_order_and_without_what_says_nothing() -> None:
    """Spaces, order, repetitions and what a wider network covers make no difference."""
    cidrs = "fd00::1,10.1.0.0/16, 10.0.0.0/8,10.0.0.0/8"
    said = Selection.from_json({"exclude_ports": "443, 80,81", "exclude_cidrs": cidrs})
    assert said.exclude_ports == (PortRange(80, 81), PortRange(443, 443))
    assert said.to_json() == {
        "exclude_ports": "80-81,443",
        "exclude_cidrs": "10.0.0.0/8,fd00::1/128",
    }


@pytest.mark.parametrize("text", ["", " ", "*"])
def test_everything_is_included_by_default(text: str) -> None:
    """Nothing and Istio's asterisk mean the same."""
    assert Selection.from_json({"include_cidrs": text, "include_ports": text}) == EVERYTHING


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"exclude_ports": "http"}, "'http' is no port; give numbers and ranges, as 22,8000-8100"),
        ({"exclude_ports": "0"}, "'0' is no port; "),
        ({"exclude_ports": "65536"}, "'65536' is no port; "),
        ({"exclude_ports": "90-80"}, "'90-80' is no port; "),
        ({"include_ports": "22,,23"}, "'' is no port; "),
        ({"exclude_ports": "*"}, "'\\*' is no port; "),
        ({"exclude_cidrs": "*"}, "'\\*' is no CIDR; give addresses and networks"),
        ({"exclude_cidrs": "10.0.0.0/33"}, "'10.0.0.0/33' is no CIDR; "),
        ({"exclude_cidrs": "shop"}, "'shop' is no CIDR; "),
        ({"exclude_cidrs": "10.1.2.3/8"}, "is an address within a network; write 10.0.0.0/8"),
        ({"exclude_cidrs": "::ffff:10.0.0.0/104"}, "is IPv4; write 10.0.0.0/8"),
        ({"exclude_cidrs": ["10.0.0.0/8"]}, "exclude_cidrs cannot be \\["),
        ({"colour": "1"}, "'colour' is no choice of ports or CIDRs"),
        (
            {"exclude_cidrs": ",".join(f"10.{i >> 8}.{i & 255}.0/24" for i in range(10_001))},
            "10001 CIDRs are too many; give at most 10000 for a direction",
        ),
    ],
)
def test_what_is_no_selection_is_refused(fields: dict[str, object], says: str) -> None:
    """In one line that says what to write instead."""
    with pytest.raises(UsageError, match=says) as caught:
        Selection.from_json(fields)
    assert "\n" not in str(caught.value)


def test_a_selection_in_words_is_short() -> None:
    """However long its lists are."""
    many = ",".join(f"10.0.{i}.0/24" for i in range(0, 200, 2))
    said = str(Selection.from_json({"exclude_ports": "22", "exclude_cidrs": many}))
    assert said.startswith("exclude ports 22; exclude cidrs 10.0.0.0/24,10.0.2.0/24,")
    assert said.endswith(" and 92 more")
