"""Children of the bed: what they are, what they say, and that they end."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from pyambient.errors import NeedsRoot
from tests.bed import Bed, Capability, Channel, ChildDied, is_gone, isolation, marking


def _status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_an_app_is_nobody_without_capabilities(bed: Bed) -> None:
    """By default an app has no privilege at all, effective, permitted or ambient."""
    status = bed.pod("a").run(_status)
    assert status["Uid"].split() == ["65534"] * 4
    assert status["Gid"].split() == ["65534"] * 4
    assert status["Groups"] == ""
    assert {status[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}


def test_an_app_has_just_the_capabilities_it_was_given(bed: Bed) -> None:
    """CAP_NET_RAW opens a raw socket, and nothing more comes with it."""

    def open_raw_and_try_netadmin() -> int:
        raw = socket.socket(type=socket.SOCK_RAW, proto=socket.IPPROTO_RAW)
        with raw as made, pytest.raises(PermissionError):
            made.setsockopt(socket.SOL_SOCKET, 33, 1 << 20)  # SO_RCVBUFFORCE
        return int(_status()["CapAmb"], 16)

    seen = bed.pod("a").run(open_raw_and_try_netadmin, capabilities=[Capability.NET_RAW])
    assert seen == 1 << Capability.NET_RAW


def test_an_app_that_may_set_marks_does(bed: Bed) -> None:
    """Whichever capability this kernel asks for."""

    def mark() -> int:
        with socket.socket() as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
            return made.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)

    pod = bed.pod("a")
    assert pod.run(mark, capabilities=marking(pod)) == 0x539
    with pytest.raises(PermissionError):
        pod.run(mark)


def test_a_user_who_is_not_root_learns_why(bed: Bed) -> None:
    """Without root the session is not moved, and network tests say what to do."""

    def enter_and_require() -> str:
        isolation.enter()
        with pytest.raises(pytest.fail.Exception) as caught:
            isolation.require()
        return str(caught.value)

    assert "run pytest with sudo" in bed.pod("a").run(enter_and_require)


def test_root_stays_root(bed: Bed) -> None:
    """Uid 0 keeps every capability of the session."""
    own = _status()["CapEff"]
    assert bed.pod("a").run(lambda: _status()["CapEff"], uid=0, gid=0) == own


def test_an_app_lives_in_its_pod_and_cgroup(bed: Bed) -> None:
    """Network namespace and cgroup are the pod's and the session's own, from the first socket."""
    pod = bed.pod("a")

    def where() -> tuple[int, str]:
        return Path("/proc/self/ns/net").stat().st_ino, Path("/proc/self/cgroup").read_text()

    inode, cgroups = pod.run(where)
    assert inode == pod.netns.inode
    assert f"0::/{bed.cgroup.path.name}/apps\n" in cgroups
    other = bed.cgroup.path / "other"
    other.mkdir()
    assert f"0::/{bed.cgroup.path.name}/other\n" in pod.run(where, cgroup=other)[1]
    other.rmdir()


def test_the_session_itself_stays_where_it_was(bed: Bed) -> None:
    """The pytest process is not in the cgroup that the hooks are attached to."""
    assert bed.cgroup.path.name not in Path("/proc/self/cgroup").read_text()


def test_an_exception_comes_back_with_its_traceback(bed: Bed) -> None:
    """What an app raises is raised in the test, with the child's own traceback as a note."""

    def fail_in_the_pod() -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "no")

    with pytest.raises(ConnectionRefusedError) as caught:
        bed.pod("a").run(fail_in_the_pod)
    assert "in fail_in_the_pod" in caught.value.__notes__[0]


def test_an_exception_that_cannot_be_pickled_comes_back_as_text(bed: Bed) -> None:
    """An exception with a constructor of its own is not lost."""

    def fail() -> None:
        raise NeedsRoot("enroll")

    with pytest.raises(RuntimeError, match="NeedsRoot: enroll needs root"):
        bed.pod("a").run(fail)


def test_a_result_that_cannot_be_pickled_is_an_error(bed: Bed) -> None:
    """A function that returns what cannot travel fails; it does not hang."""
    with pytest.raises(TypeError, match="cannot send"):
        bed.pod("a").run(lambda: lambda: None)


def test_a_child_that_dies_is_reported(bed: Bed) -> None:
    """A killed child is an error at once, not a timeout."""
    pod = bed.pod("a")
    with pytest.raises(ChildDied, match="wait status 9"):
        pod.run(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_child_that_hangs_is_ended(bed: Bed, capfd: pytest.CaptureFixture[str]) -> None:
    """After the timeout the child prints where it hangs, and is gone."""

    def hang_here() -> None:
        time.sleep(60)

    with pytest.raises(TimeoutError, match="a:hang_here"):
        bed.pod("a").run(hang_here, timeout=0.2)
    assert "in hang_here" in capfd.readouterr().err
    assert bed.cgroup.pids() == []


def test_messages_go_both_ways(bed: Bed) -> None:
    """A spawned function and the test talk in values; its result comes last."""

    def adder(channel: Channel) -> str:
        while (value := channel.receive()) is not None:
            channel.send(value + 1)
        return "done"

    child = bed.pod("a").spawn(adder)
    assert [child.ask(1), child.ask(41)] == [2, 42]
    child.send(None)
    assert child.wait() == "done"


def test_a_child_holds_nothing_of_other_children(bed: Bed) -> None:
    """No descriptor of the session leaks into a child: an end of file stays one."""
    pod = bed.pod("a")
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", 0))
        number = ours.fileno()
        seen = pod.run(lambda: Path(f"/proc/self/fd/{number}").readlink())
    assert seen == Path("/dev/null")


def test_teardown_ends_everything(bed: Bed) -> None:
    """Whatever still runs in the sub-tree is ended by pid, grandchildren too."""

    def fork_and_wait(channel: Channel) -> None:
        child = os.fork()
        channel.send(child or os.getpid())
        time.sleep(60)

    child = bed.pod("a").spawn(fork_and_wait)
    grandchild = {child.receive(), child.receive()} - {child.pid}
    assert grandchild < set(bed.cgroup.pids())
    bed.cgroup.kill()
    assert bed.cgroup.pids() == []
    assert not child.alive


def test_what_is_gone_has_closed_its_listeners(bed: Bed) -> None:
    """Not its first thread's end counts: another one keeps the process's sockets for a while."""
    pod = bed.pod("a")

    def listen(channel: Channel) -> None:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # noqa: TID251 - no trio here
        listener = socket.create_server(("127.0.0.1", 8080))
        held = [socket.create_connection(listener.getsockname()) for _ in range(100)]
        channel.send(len(held))
        channel.receive()

    for _ in range(20):
        with pod.spawn(listen) as child:
            assert child.receive() == 100
            os.kill(child.pid, signal.SIGKILL)
            while not is_gone(child.pid):
                os.sched_yield()
            with pod.netns.socket(socket.AF_INET, socket.SOCK_STREAM) as late:
                assert late.connect_ex(("127.0.0.1", 8080)) == errno.ECONNREFUSED
