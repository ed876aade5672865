"""A proxy process as `pyambient proxy` is, told of its pods directly.

`python -m pyambient.bench.proxy SETTINGS`, a JSON object as `start` takes it. There is no agent:
what would come by ZDS and the details channel comes from the command line. All else is the
product: mesh view, policies, certificates, access log.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import trio

from pyambient.bench.nested import NestedLoop
from pyambient.bench.pods import Placement
from pyambient.children import module
from pyambient.engine.collector import calm
from pyambient.engine.loop import Loop
from pyambient.engine.scheduling import shorten_slices
from pyambient.errors import PyambientError
from pyambient.hbone import LocalSettings
from pyambient.identity.ca import EmbeddedAuthority
from pyambient.identity.store import CertificateStore
from pyambient.mesh.view import MeshView
from pyambient.model.numbers import DEFAULT_TRUST_DOMAIN
from pyambient.model.workload import PodRef
from pyambient.netns import Netns
from pyambient.observe.accesslog import AccessLog
from pyambient.observe.logs import configure
from pyambient.observe.sink import LineSink
from pyambient.proxy.pods import Pods
from pyambient.proxy.worker import Worker
from pyambient.zds.details import DnsCapture, PodDetails

_READY: Final = "ready\n"


async def _main(settings: dict[str, Any], loop: Loop, sink: LineSink) -> None:
    authority = EmbeddedAuthority.open(Path(settings["ca_dir"]), DEFAULT_TRUST_DOMAIN)
    certificates = CertificateStore(authority)
    view = MeshView()
    if settings["mesh"]:
        view.load(Path(settings["mesh"]))
    access_log = AccessLog("plain", sink.put)
    http2 = LocalSettings(**settings["http2"])
    worker = Worker(loop, view, certificates, access_log, DEFAULT_TRUST_DOMAIN, http2)
    async with trio.open_nursery() as nursery:
        pods = Pods(worker, nursery)
        view.on_change = pods.mesh_changed
        for task in (sink.run, worker.run_deadlines, certificates.run):
            nursery.start_soon(task)
        for pod in settings["pods"]:
            await _serve(pods, pod)
        await pods.retain(frozenset(pod["name"] for pod in settings["pods"]))
        calm()
        shorten_slices()
        sys.stdout.write(_READY)
        sys.stdout.flush()
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                nursery.cancel_scope.cancel()


async def _serve(pods: Pods, pod: dict[str, Any]) -> None:
    name = pod["name"]
    dns = DnsCapture(**pod["dns"]) if "dns" in pod else None
    await pods.describe(name, PodDetails(pod["backend"], tuple(pod["addresses"]), dns=dns))
    netns = Netns.open(f"fd:{pod['fd']}")
    await pods.add(PodRef(name, name, pod["namespace"], name), netns)


def start(
    place: Placement, settings: Mapping[str, Any], pods: Iterable[Netns]
) -> subprocess.Popen[str]:
    """A proxy that listens in its pods.

    `settings` are "mesh" (a file, or ""), "ca_dir", "log" (a file), "http2" (fields of
    `LocalSettings`), "nested" (a loop in a trio task) and "pods", each with "name", "namespace",
    "fd" (the network namespace), "backend", "addresses" and, where its DNS is captured, "dns"
    (fields of `DnsCapture`).
    """
    command = module("pyambient.bench.proxy", json.dumps(settings))
    fds = tuple(pod.fd for pod in pods)
    process = place.start(command, stdout=subprocess.PIPE, pass_fds=fds)
    assert process.stdout is not None  # noqa: S101 - a pipe
    if process.stdout.readline() != _READY:
        raise PyambientError("pyambient's proxy did not start", "see what it wrote above")
    return process


def _report(error: BaseException, owner: object) -> None:
    sys.stderr.write(f"internal error of {owner!r}: {error!r}\n")


def main() -> None:
    settings = json.loads(sys.argv[1])
    log = os.open(settings["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sink = LineSink(log)
    configure("plain", "info", sink.put)
    loop = (NestedLoop if settings.get("nested") else Loop)(_report)
    with contextlib.suppress(KeyboardInterrupt):
        loop.run(_main, settings, loop, sink)


if __name__ == "__main__":
    main()
