"""The pods of one process: when they begin to take connections."""

from __future__ import annotations

import contextlib
import socket

import trio

from pyambient.model.numbers import HBONE_PORT
from pyambient.netns import Netns
from pyambient.proxy.pods import Pods
from tests.bed import BedPod

from .rig import proxied


def send_nonsense(pod: BedPod) -> socket.socket:
    """A connection to the pod's HBONE listener, which whoever accepts it closes."""
    peer = pod.netns.socket(socket.AF_INET, socket.SOCK_STREAM)
    peer.connect((pod.ipv4, HBONE_PORT))
    peer.sendall(b"no TLS at all" * 10)
    peer.setblocking(False)
    return peer


def is_open(peer: socket.socket) -> bool:
    """Whether nobody has answered."""
    try:
        peer.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except ConnectionResetError:
        pass
    return False


async def wait_closed(peer: socket.socket) -> None:
    """Read an alert, if there is one, and the end."""
    with contextlib.suppress(ConnectionResetError):
        while True:
            await trio.lowlevel.wait_readable(peer)
            if not peer.recv(100):
                return


def test_nothing_is_accepted_before_the_agent_has_named_all_its_pods(bed, tmp_path):
    """One pod must not take another, which is about to be named, for no workload of the mesh."""
    waiting, other = bed.pod("waiting"), bed.pod("other")

    async def test(rig):
        pods = Pods(rig.worker, rig.nursery)
        await pods.add(rig.ref(waiting), Netns.open("waiting"))
        await rig.serve(other)
        with send_nonsense(waiting) as first, send_nonsense(other) as second:
            await wait_closed(second)
            assert is_open(first)
            await pods.retain(frozenset({"waiting"}))
            await wait_closed(first)
        await pods.retain(frozenset())

    proxied(bed, tmp_path, test)
