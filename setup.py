"""With PYAMBIENT_COMPILE=1 mypyc builds the byte path as C extensions, from the same source.

What is compiled is what each connection, frame or batch of bytes meets. All else about the package
is in pyproject.toml and setup.cfg.
"""

from __future__ import annotations

import os

from setuptools import setup

BYTE_PATH = {
    "hbone": (
        *("__init__", "connection", "control", "endpoint", "errors", "frames", "handlers"),
        *("headers", "interface", "limits", "output", "receiver", "request", "streams"),
    ),
    "engine": (
        *("accept", "loop", "pacing", "plain", "relay", "reservoir", "splicing", "tls"),
        "tunnel",
    ),
    "mesh": ("authorize", "inbound", "route"),
    "observe": ("accesslog",),
    "proxy": (
        *("addresses", "budgets", "direct", "inbound", "neighbours", "outbound", "plain"),
        *("plaintext", "records", "sockets"),
    ),
}

if os.environ.get("PYAMBIENT_COMPILE") == "1":
    from mypyc.build import mypycify

    names = [f"pyambient/{room}/{name}.py" for room, names in BYTE_PATH.items() for name in names]
    setup(ext_modules=mypycify(names))
else:
    setup()
