"""The mesh as this node sees it now: what enrolments publish, and what the mesh file says.

General theory of operation
---------------------------
Every change builds a whole `Snapshot` and swaps it in; a decision that is under way keeps the one
it started with. Nothing is ever changed in place.

Who wins where the two speak of one pod is `merge`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pyambient.model.numbers import DEFAULT_TRUST_DOMAIN
from pyambient.model.workload import Workload
from pyambient.observe.logs import get_logger

from .localfile import Stamp, read
from .localschema import LocalConfig
from .merge import merge
from .snapshot import Snapshot

_log = get_logger("mesh")
# A file may be wrong a thousand times in one way; a log shows the first few of them.
_LINES_SHOWN = 20


class MeshView:
    """Holds the current `snapshot`; used from the proxy's one thread.

    `on_change` is called after every swap.
    """

    def __init__(self, trust_domain: str = DEFAULT_TRUST_DOMAIN) -> None:
        self.snapshot = Snapshot()
        self.trust_domain = trust_domain
        self.stamp: Stamp | None = None
        self._enrolled: dict[str, Workload] = {}
        self._config = LocalConfig()
        self._source = ""
        self._said: frozenset[str] = frozenset()
        self.on_change: Callable[[], None] | None = None

    def publish(self, workload: Workload) -> None:
        """Add an enrolled pod, or say what has changed about it."""
        self._enrolled[workload.uid] = workload
        self._rebuild()

    def withdraw(self, uid: str) -> None:
        """Take an enrolled pod away; what the file says stays."""
        if self._enrolled.pop(uid, None) is not None:
            self._rebuild()

    def load(self, path: Path) -> None:
        """Take the file in place of what was loaded before; MeshFileError, and nothing changes."""
        config, stamp = read(path, self.trust_domain)
        self.use(config, str(path), stamp)

    def use(self, config: LocalConfig, source: str, stamp: Stamp | None = None) -> None:
        """Take `config`, read from the file `source`, in place of what was loaded before."""
        self._config, self._source, self.stamp = config, source, stamp
        self._rebuild()

    def _rebuild(self) -> None:
        """Swap in a snapshot of what is known now, and say what is wrong with it."""
        config = self._config
        merged = merge(config.workloads, tuple(self._enrolled.values()), self._source)
        self.snapshot = Snapshot(
            merged.workloads, config.services, config.policies, merged.also_known_as
        )
        said = (*merged.conflicts, *self.snapshot.warnings, *merged.matches)
        unsaid = [line for line in said if line not in self._said]
        for line in unsaid[:_LINES_SHOWN]:
            (_log.info if line in merged.matches else _log.warning)(line)
        if len(unsaid) > _LINES_SHOWN:
            _log.warning(f"{len(unsaid) - _LINES_SHOWN} more of the like are not shown")
        self._said = frozenset(said)
        if self.on_change is not None:
            self.on_change()

    def __repr__(self) -> str:
        pods = f"{len(self._enrolled)} enrolled pods"
        return f"<MeshView {self._source or 'without a file'}, {pods}, {self.snapshot!r}>"
