"""What the tests of the byte path have in common."""

from __future__ import annotations

import pytest

from pyambient.identity.ca import EmbeddedAuthority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedAuthority:
    return EmbeddedAuthority.open(tmp_path_factory.mktemp("ca"), "cluster.local")
