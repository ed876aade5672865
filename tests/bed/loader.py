"""Which loader the tests load BPF programs by; the second one by `make test LOADER=bcc`."""

from __future__ import annotations

import os
from typing import Final

LOADER: Final = os.environ.get("PYAMBIENT_TEST_LOADER", "libbpf")
