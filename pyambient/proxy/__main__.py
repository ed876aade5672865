"""`python -m pyambient.proxy SETTINGS`: the proxy without the libraries of a command line.

SETTINGS are `ProxySettings` as JSON. This is what `pyambient proxy` becomes, not what people type.
"""

from __future__ import annotations

import sys
import traceback

from pyambient.errors import told

from .main import run
from .settings import ProxySettings


def main() -> None:
    settings = ProxySettings.from_json(sys.argv[1])
    try:
        run(settings)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every failure ends as one line
        if settings.debug:
            traceback.print_exc()
        line, code = told(error)
        sys.stderr.write(f"error: {line}\n")
        sys.exit(code)


if __name__ == "__main__":
    main()
