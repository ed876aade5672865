"""The committed protobuf code is what protoc makes of zds.proto."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc_tools import protoc

import pyambient

SOURCES = Path(pyambient.__file__).parent.parent


@pytest.mark.parametrize("name", ["zds_pb2.py", "zds_pb2.pyi"])
def test_the_generated_code_is_current(tmp_path: Path, name: str) -> None:
    """Whoever changes zds.proto runs protoc: regenerated, both files are as they are committed."""
    options = [f"-I{SOURCES}", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    assert protoc.main(["protoc", *options, "pyambient/zds/zds.proto"]) == 0
    made = (tmp_path / "pyambient/zds" / name).read_text()
    assert (SOURCES / "pyambient/zds" / name).read_text() == made
