"""What every test can use: the test bed's fixtures, and the namespaces they live in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyambient.intercept.loader import use
from tests.bed import isolation
from tests.bed.cgroup import CgroupTree
from tests.bed.loader import LOADER
from tests.bed.mesh import Mesh
from tests.bed.network import Bed


def pytest_configure() -> None:
    """Leave the machine's namespaces before any thread exists that would stay in them."""
    isolation.enter()
    use(LOADER)


def pytest_report_header() -> str:
    """Which loader is under test."""
    return f"BPF programs are loaded by {LOADER}"


@pytest.fixture(scope="session")
def isolated() -> None:
    """Own mount and network namespaces; the test fails with the reason where there are none."""
    isolation.require()


@pytest.fixture(scope="session")
def cgroup_tree(isolated: None) -> Iterator[CgroupTree]:
    """A cgroup2 sub-tree of this session, removed with all that runs in it."""
    tree = CgroupTree.create()
    yield tree
    tree.remove()


@pytest.fixture
def bed(cgroup_tree: CgroupTree) -> Iterator[Bed]:
    """A bridge and pods on it, gone after the test with every process the test started."""
    with Bed(cgroup_tree) as made:
        yield made


@pytest.fixture(scope="module")
def mesh_settings() -> dict[str, Any]:
    """What `Mesh` takes beside bed and directory: a module may want another one."""
    return {}


@pytest.fixture
def mesh(bed: Bed, tmp_path: Path, mesh_settings: dict[str, Any]) -> Iterator[Mesh]:
    """A running `pyambient up`; un-enrols all at the end and fails if anything is left behind."""
    with Mesh(bed, tmp_path, **mesh_settings) as made:
        yield made


@pytest.fixture(params=["v4", "v6"])
def family(request: pytest.FixtureRequest) -> str:
    """The IP family of the test's traffic."""
    return str(request.param)


@pytest.fixture(scope="module", params=["bpf", "tc", "nftables", "iptables"])
def backend(request: pytest.FixtureRequest) -> str:
    """The interception backend under test."""
    return str(request.param)
