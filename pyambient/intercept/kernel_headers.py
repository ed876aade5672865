"""Kernel headers where bcc looks for them, for one thread of ours and nobody else.

bcc takes them from /lib/modules/RELEASE/build, and from nowhere else. On a node whose own kernel
has none there, those of another kernel do as well: the programs read no structure of the kernel's,
only its user API. They are bound to that place in a mount namespace that one thread makes for
itself and takes along when it ends.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from pyambient.errors import PyambientError

_MODULES: Final = Path("/lib/modules")
_SOURCES: Final = Path("/usr/src")
_CLONE_NEWNS: Final = 0x20000
_MS_REC: Final = 1 << 14
_MS_PRIVATE: Final = 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")


def with_headers(work: Callable[[], _T]) -> _T:
    """The result of `work`, run in a thread that sees kernel headers; PyambientError if none are.

    Kernel objects and memory that `work` makes belong to the process, as always.
    """
    release = os.uname().release
    if (_MODULES / release / "build").exists():
        return work()
    headers = newest_headers(_SOURCES)
    return _in_thread(lambda: _bind(headers, release), work)


def newest_headers(sources: Path) -> Path:
    """The headers of the newest kernel that has some in `sources`, of those for a machine."""
    found = [path for path in sources.glob("linux-headers-*") if (path / ".config").exists()]
    if not found:
        raise PyambientError(
            "bcc needs kernel headers, and there are none",
            "run 'apt install linux-headers-amd64' (any version), or use --bpf-loader libbpf",
        )
    return max(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _bind(headers: Path, release: str) -> None:
    """Make `headers` the running kernel's in a mount namespace of this thread's own."""
    _check(_libc.unshare(_CLONE_NEWNS))
    _check(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))
    _check(_libc.mount(b"tmpfs", os.fsencode(_MODULES), b"tmpfs", ctypes.c_ulong(0), None))
    place = _MODULES / release
    place.mkdir()
    (place / "build").symlink_to(headers)
    (place / "source").symlink_to(_common(headers))


def _common(headers: Path) -> Path:
    """Debian keeps what all flavours share apart; elsewhere it is in the same place."""
    shared = headers.with_name(f"{headers.name.rpartition('-')[0]}-common")
    return shared if shared.exists() else headers


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise PyambientError(
            f"kernel headers cannot be put where bcc looks for them: {os.strerror(code)}",
            "use --bpf-loader libbpf",
        )


def _in_thread(prepare: Callable[[], None], work: Callable[[], _T]) -> _T:
    """`work` after `prepare`, in a thread that ends with them."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            prepare()
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            errors.append(error)

    # trio keeps its threads for other work, in this namespace; this one must end.
    thread = threading.Thread(target=run, name="kernel-headers")  # noqa: TID251 - see above
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
