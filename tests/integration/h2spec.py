"""h2spec (https://github.com/summerwind/h2spec), built from source, and what it reports."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import socket
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from pyambient.model.address import SocketAddress
from tests.bed import Channel

from . import attacker

_MODULE = "github.com/summerwind/h2spec/cmd/h2spec"
_VERSION = "v2.2.1+incompatible"
_CASE_SECONDS = 3
_ALL_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Case:
    """One case: the section of the specification it stands for, its text, and its failure."""

    section: str
    text: str
    failure: str


def build() -> Path:
    """The executable; built once, into PYAMBIENT_CACHE."""
    cache = Path(os.environ.get("PYAMBIENT_CACHE", Path.home() / ".cache" / "pyambient"))
    binary = cache / f"h2spec-{_VERSION.partition('+')[0]}" / "h2spec"
    if binary.exists():
        return binary
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        pytest.fail(
            "h2spec is built from source: install Go (https://go.dev/dl/) and try again",
            pytrace=False,
        )
    environment = os.environ | {"GOBIN": str(binary.parent)}
    command = [go, "install", f"{_MODULE}@{_VERSION}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"go install {_MODULE} failed: {done.stderr[-500:]}"
    return binary


def relay(channel: Channel, port: int, to: SocketAddress, who: attacker.Credentials) -> None:
    """Give each connection to `port` of loopback the client certificate that h2spec cannot."""
    context = attacker.context(who)
    with socket.create_server(("127.0.0.1", port), backlog=64) as listening:
        channel.send("listening")
        selector = selectors.DefaultSelector()
        selector.register(listening, selectors.EVENT_READ)
        selector.register(channel, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is channel:
                    return
                if key.fileobj is listening:
                    _join(selector, listening.accept()[0], context, to)
                else:
                    _move(selector, *key.data)


_Ends = tuple[socket.socket, socket.socket]


def _join(
    selector: selectors.BaseSelector,
    near: socket.socket,
    context: ssl.SSLContext,
    to: SocketAddress,
) -> None:
    far = context.wrap_socket(socket.create_connection(to, attacker.TIMEOUT))
    for ends in ((near, far), (far, near)):
        selector.register(ends[0], selectors.EVENT_READ, ends)


def _move(selector: selectors.BaseSelector, source: socket.socket, sink: socket.socket) -> None:
    """Pass on what is there; the end or a failure of one side ends both."""
    if source.fileno() < 0:
        return  # the other end closed it in this round
    try:
        data = source.recv(1 << 16)
        while data:
            sink.sendall(data)
            pending = isinstance(source, ssl.SSLSocket) and source.pending()
            if not pending:
                return
            data = source.recv(1 << 16)
    except OSError:
        pass
    for end in (source, sink):
        selector.unregister(end)
        _close(end)


def _close(end: socket.socket) -> None:
    """Close without a reset, which would overtake what was sent last."""
    end.settimeout(1)
    with contextlib.suppress(OSError), end:
        if isinstance(end, ssl.SSLSocket):
            return
        end.shutdown(socket.SHUT_WR)
        while end.recv(1 << 16):
            pass


def run(binary: str, port: int) -> str:
    """Run every case against `port` of loopback; the report, as JUnit has it."""
    report = "/proc/self/fd/1"
    command = [binary, "--host=127.0.0.1", f"--port={port}", f"--timeout={_CASE_SECONDS}"]
    command += ["--strict", f"--junit-report={report}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_ALL_SECONDS
    )
    return done.stdout[done.stdout.index("<?xml") :]


def cases(report: str) -> list[Case]:
    """What the report says of each case that ran."""
    found = []
    for case in ET.fromstring(report).iter("testcase"):
        failure = case.find("failure")
        failure = case.find("error") if failure is None else failure
        text = "" if failure is None else (failure.text or "failed")
        found.append(Case(case.get("package", ""), case.get("classname", ""), text))
    return found
