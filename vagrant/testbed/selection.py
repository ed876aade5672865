"""Which tests are for which backend, and how many of them an examination takes.

Tests carry the backend they are for in their name; what is for none goes with `iptables`.
"""

from __future__ import annotations

import enum

BACKENDS = ("bpf", "tc", "nftables", "iptables")


class Extent(enum.StrEnum):
    """How much is examined."""

    CORE = "core"
    """Traffic between pods with every backend: minutes of an emulated CPU."""
    ALL = "all"
    """Every interception test: most of a day of it."""


_ALL = ("tests/intercept", "tests/integration")
_ELSEWHERE = (
    # The compilers stay on the host, and so do the tests that compile programs for themselves.
    "tests/intercept/test_bpf_loader.py",
    "tests/intercept/test_bcc_loader.py",
    "tests/integration/test_bcc.py",
    # A run of an sk_lookup program by itself takes Linux 5.13; what is decided there is the same.
    "tests/intercept/test_bpf_programs.py",
    # What the proxy does with a connection once it has it is the same on every kernel.
    "tests/integration/test_interop.py",
    "tests/integration/test_policy.py",
    "tests/integration/test_security.py",
)

# The parameter, or the module; without what is around it, "tc" is in tcp and in match as well.
_OF_TC = ("test_tc.py", "test_tc_dns.py", "test_tc_forwarded.py", "test_fence.py")
_TC = f"([tc- or -tc- or -tc] or [tc] or {' or '.join(_OF_TC)})"
# What is for BPF whatever the backend.
_BPF = "(bpf or test_trace_reader.py or test_node_objects.py)"
_SELECTION = {
    "bpf": f"{_BPF} and not foreign and not {_TC}",
    "tc": _TC,
    "nftables": f"nftables and not {_BPF} and not {_TC}",
    "iptables": f"not {_BPF} and not nftables and not {_TC}",
}
# Half a minute of an emulated CPU goes into an enrolment, which a module shares: what both families
# and every kind of traffic do in one. BPF programs depend on the kernel most of all: bypasses, DNS,
# exclusions as well.
_CORE = {
    "bpf": (
        "tests/integration/test_capture.py",
        "tests/integration/test_bypass.py",
        "tests/intercept/test_dns_queries.py::test_two_resolvers_on_one_socket",
        "tests/intercept/test_exclusions.py::test_a_port_is_excluded",
    ),
    "tc": (
        "tests/integration/test_capture.py",
        "tests/intercept/test_dns_queries.py::test_two_resolvers_on_one_socket",
        "tests/intercept/test_fence.py::test_apps_get_nothing_out",
    ),
    "nftables": ("tests/integration/test_capture.py",),
    "iptables": ("tests/integration/test_capture.py",),
}
# Without a thousand connections and one test per port; "Linux" is the fixture that makes a later
# kernel look as 5.10 does.
_BRIEF = "not thousand and not nobody_takes and not Linux"


def arguments(backend: str, extent: Extent) -> list[str]:
    """What makes pytest run the tests of this backend."""
    which = _SELECTION[backend]
    if extent is Extent.ALL:
        return [*(f"--ignore={path}" for path in _ELSEWHERE), "-k", which, *_ALL]
    return ["--maxfail=3", "-k", f"{which} and {_BRIEF}", *_CORE[backend]]
