"""Which loader the tests load BPF programs by; `make test-bcc` runs them by the second one."""

from __future__ import annotations

import os
from typing import Final

LOADER: Final = os.environ.get("PYAMBIENT_TEST_LOADER", "libbpf")
