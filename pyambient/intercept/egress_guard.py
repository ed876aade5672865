"""The guard on a pod's devices: nothing of a captured socket leaves the pod in plain text.

tcx (Linux 6.6) attaches by a link, which is pinned and belongs to us alone. Before, the program is
a filter of the device's clsact qdisc, at a priority and handle of its own; the qdisc goes with it
if nobody else had one there. Which of the two this kernel takes is found by trying.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import socket
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from .bpf_node import existing_map, pod_directory
from .interface import Pod, Stage, step
from .kernel_objects import AttachType, Link
from .loader import Constants, load
from .rtnetlink import request, routing

_PROGRAM: Final = "pyamb_guard"
_MAP: Final = "captured_socks"
_EGRESS: Final = 0xFFFFFFF3
_CLSACT: Final = 0xFFFF0000
_PRIORITY: Final = 1
_HANDLE: Final = 1
_NO_TCX: Final = frozenset((errno.EINVAL, errno.EOPNOTSUPP))
_GONE: Final = frozenset((errno.ENOENT, errno.ENODEV, errno.EINVAL))


@step
@dataclass(frozen=True, slots=True)
class EgressGuard:
    """The guard on one device; `index` and the rest are what `apply` found and did."""

    kind: ClassVar[str] = "bpf-guard"
    stage: ClassVar[Stage] = Stage.APPLY

    bpffs: str
    device: str
    index: int = field(default=0, compare=False)
    by_filter: bool = field(default=False, compare=False)
    made_qdisc: bool = field(default=False, compare=False)

    def describe(self) -> str:
        return f"bpf attach guard to the egress of {self.device}, pinned in {self.bpffs}/pods"

    def apply(self, pod: Pod) -> Self:
        if self.missing(pod) is None:
            return self
        self.undo(pod)
        index = self._current_index(pod)
        shared = existing_map(Path(self.bpffs), _MAP)
        with shared, load("guard", Constants(), {_MAP: shared}) as loaded:
            program = loaded.program_fd(_PROGRAM)
            if self._link(pod, program, index):
                return dataclasses.replace(self, index=index, by_filter=False)
            made = _add_filter(pod, program, index)
        return dataclasses.replace(self, index=index, by_filter=True, made_qdisc=made)

    def undo(self, pod: Pod) -> None:
        self._pin(pod).unlink(missing_ok=True)
        if self.by_filter and pod.netns.fd >= 0:
            _remove_filter(pod, self.index, qdisc=self.made_qdisc)

    def missing(self, pod: Pod) -> str | None:
        if self._current_index(pod) != self.index:
            return f"{self.device} is another device now"
        if self.by_filter:
            return None if _has_filter(pod, self.index) else f"no guard on {self.device}"
        link = Link.open_pinned(self._pin(pod))
        if link is None:
            return f"no guard on {self.device}"
        with link:
            attached = link.info().target == self.index
        return None if attached else f"the guard has lost {self.device}"

    def _link(self, pod: Pod, program: int, index: int) -> bool:
        """Attach by tcx; False where this kernel has none."""
        try:
            with pod.netns.entered():
                link = Link.create(program, index, AttachType.TCX_EGRESS)
        except OSError as error:
            if error.errno in _NO_TCX:
                return False
            raise
        with link:
            link.pin(self._pin(pod))
        return True

    def _current_index(self, pod: Pod) -> int:
        with pod.netns.entered():
            return socket.if_nametoindex(self.device)

    def _pin(self, pod: Pod) -> Path:
        name = urllib.parse.quote(self.device, safe="").replace(".", "%2E")
        return pod_directory(Path(self.bpffs), pod.uid) / f"guard-{name}"


def _add_filter(pod: Pod, program: int, index: int) -> bool:
    """Attach as a filter of the clsact qdisc; whether the qdisc had to be made."""
    made = request(pod.netns, lambda k: k.tc("add", "clsact", index=index), {errno.EEXIST})

    def add(kernel: Any) -> None:
        kernel.tc(
            "replace-filter",
            "bpf",
            index=index,
            handle=_HANDLE,
            prio=_PRIORITY,
            parent=_EGRESS,
            fd=program,
            name=_PROGRAM,
            direct_action=True,
        )

    try:
        request(pod.netns, add, ())
    except OSError:
        if made:
            request(pod.netns, lambda k: k.tc("del", "clsact", index=index), _GONE)
        raise
    return made


def _remove_filter(pod: Pod, index: int, *, qdisc: bool) -> None:
    if qdisc:
        request(pod.netns, lambda k: k.tc("del", "clsact", index=index), _GONE)
        return

    def remove(kernel: Any) -> None:
        kernel.tc("del-filter", "bpf", index=index, handle=_HANDLE, prio=_PRIORITY, parent=_EGRESS)

    request(pod.netns, remove, _GONE)


def _has_filter(pod: Pod, index: int) -> bool:
    with routing(pod.netns) as kernel, contextlib.suppress(Exception):
        for message in kernel.get_filters(index=index, parent=_EGRESS):
            options = message.get_attr("TCA_OPTIONS")
            if options is not None and options.get_attr("TCA_BPF_NAME") == _PROGRAM:
                return True
    return False
