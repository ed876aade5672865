"""The mirrors of this machine, out of what apt says."""

from __future__ import annotations

import pytest

from vagrant.testbed.errors import BedError
from vagrant.testbed.packages import mirrors

_SOURCES = """\
'http://mirror.test/vendor/dists/stable/InRelease' mirror.test_vendor_dists_stable_InRelease 0
'http://mirror.test/debian/dists/bookworm/InRelease' mirror.test_debian_dists_bookworm_InRelease 0
'http://mirror.test/debian/dists/bookworm/main/binary-amd64/Packages.xz' mirror.test_Packages 0
'http://safe.test/sec/dists/bookworm-security/InRelease' safe.test_sec_dists_InRelease 0
"""


def test_the_mirrors_are_those_of_the_release() -> None:
    """The release's mirror is told from a vendor's by its security suite."""
    assert mirrors(_SOURCES) == ("http://mirror.test/debian", "http://safe.test/sec")


def test_a_machine_without_debian_is_told() -> None:
    """Sources of something else give one line with what to do."""
    with pytest.raises(BedError, match="copy a filled PYAMBIENT_CACHE"):
        mirrors(_SOURCES.splitlines()[0])
