"""Doing something that nobody waits for until it works."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from pyambient.errors import PyambientError


async def until_done(
    action: Callable[[], Awaitable[object]], pause: float, say: Callable[[str], None]
) -> None:
    """Try again after `pause` s whatever fails with PyambientError or OSError.

    `say` is told why, once for each time in a row that it is for the same reason.
    """
    said = ""
    while True:
        try:
            await action()
            break
        except (PyambientError, OSError) as error:
            if str(error) != said:
                said = str(error)
                say(said)
        await trio.sleep(pause)
