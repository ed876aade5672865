"""`python -m pyambient.proxy SETTINGS [SEAT]`: the proxy without the libraries of a command line.

SETTINGS are `ProxySettings` as JSON; SEAT makes it one worker of several. This is what `pyambient
proxy` becomes, and what that starts, not what people type.
"""

from __future__ import annotations

import sys
import traceback

from pyambient.errors import told

from .settings import ProxySettings, Seat


def main() -> None:
    settings, seat = ProxySettings.from_json(sys.argv[1]), Seat.from_words(sys.argv[2:])
    try:
        _run(settings, seat)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every failure ends as one line
        if settings.debug:
            traceback.print_exc()
        line, code = told(error)
        sys.stderr.write(f"error: {line}\n")
        sys.exit(code)


def _run(settings: ProxySettings, seat: Seat | None) -> None:
    """The parent of workers is none itself: it does without what a worker takes."""
    if settings.workers > 1 and seat is None:
        from .parent import run as run_parent  # noqa: PLC0415 - see above

        run_parent(settings)
    else:
        from .main import run  # noqa: PLC0415 - see above

        run(settings, seat)


if __name__ == "__main__":
    main()
