"""The agent's socket: bounded, for root, and never without an answer."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator

import pytest
import trio

from pyambient.agent.api import REQUEST_LIMIT
from pyambient.agent.client import AgentAbsent, ask
from pyambient.errors import PyambientError, UsageError

from .rig import Rig


@pytest.fixture
def connection(rig: Rig) -> Iterator[socket.socket]:
    """A connection to an agent."""
    rig.start_agent()
    with socket.socket(socket.AF_UNIX) as made:
        made.settimeout(20)
        made.connect(str(rig.run_dir.agent_socket))
        yield made


def answers(connection: socket.socket, *lines: bytes) -> list[dict[str, object]]:
    """Send lines, read as many answers."""
    connection.sendall(b"".join(line + b"\n" for line in lines))
    with connection.makefile("rb") as reader:
        return [json.loads(reader.readline()) for _ in lines]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff",
        b"[]",
        b"3",
        b'{"command": []}',
        b'{"command": "nonsense"}',
        b'{"command": "enroll"}',
        b'{"command": "enroll", "netns": 3, "name": "a", "namespace": "b", "service_account": "c"}',
        b'{"command": "unenroll"}',
        b'{"command": "unenroll", "netns": "/run/netns/nowhere"}',
        b'{"command": "unenroll", "netns": "a\\u0000b"}',
        b'{"command": "unenroll", "netns": "\\ud800"}',
        b'{"command": "unenroll", "netns": "a\\nb"}',
        b"[" * 60000,
        b'{"command": "verify", "netns": "nowhere"}',
    ],
)
def test_a_bad_request_is_a_usage_error(connection: socket.socket, line: bytes) -> None:
    """It gets one line and exit code 2, and the connection and the agent go on."""
    refused, served = answers(connection, line, b'{"command": "status"}')
    error = refused["error"]
    assert isinstance(error, dict)
    assert error["exit_code"] == UsageError.exit_code
    assert "\n" not in error["what"]
    assert "result" in served


@pytest.mark.parametrize("span", ["NaN", "-1", '"soon"', "1e99", "[]"])
def test_a_drain_timeout_is_a_number_of_seconds(rig: Rig, span: str) -> None:
    """Nothing else is waited for, and the pod stays enrolled."""
    rig.start_agent()
    rig.start_proxy()
    rig.enroll(rig.bed.pod("one"), "iptables")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(rig.run_dir.agent_socket))
        line = f'{{"command": "unenroll", "netns": "one", "drain_timeout": {span}}}'
        (refused,) = answers(connection, line.encode())
    assert "drain_timeout is a number" in str(refused["error"])
    assert [pod["state"] for pod in rig.ask("status")["pods"]] == ["enrolled"]


def test_a_request_without_end_is_cut_off(connection: socket.socket) -> None:
    """The agent reads no more than the limit, hangs up and goes on serving others."""
    with pytest.raises(ConnectionError):
        connection.sendall(b" " * REQUEST_LIMIT * 100)


def test_a_client_that_leaves_early_harms_nobody(rig: Rig, connection: socket.socket) -> None:
    """Half a line and gone; a whole request and gone: the next client is served."""
    connection.sendall(b'{"command": "sta')
    connection.close()
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(rig.run_dir.agent_socket))
        other.sendall(b'{"command": "status"}\n')
    assert rig.ask("status")["pods"] == []


def test_status_names_agent_and_proxies(rig: Rig) -> None:
    """Who is there, by pid, the newest proxy last; and what the proxy says of each pod."""
    agent = rig.start_agent()
    first = rig.start_proxy()
    rig.wait_for_proxies()
    second = rig.start_proxy()
    rig.wait_for_proxies(2)
    rig.enroll(rig.bed.pod("one"))
    status = rig.ask("status")
    assert status["agent"]["pid"] == agent.pid
    assert status["proxies"] == [first.pid, second.pid]
    assert [(pod["name"], pod["proxy"]) for pod in status["pods"]] == [("one", {"listeners": 3})]


def test_the_sockets_are_roots_alone(rig: Rig) -> None:
    """Mode 0600, in a directory of mode 0700."""
    rig.start_agent()
    run_dir = rig.run_dir
    for path in (run_dir.agent_socket, run_dir.zds_socket, run_dir.details_socket):
        assert path.stat().st_mode & 0o777 == 0o600
    assert run_dir.path.stat().st_mode & 0o777 == 0o700


def test_a_stale_socket_is_no_agent(rig: Rig) -> None:
    """What a killed agent left is told from a running one, and is no hindrance to the next."""
    agent = rig.start_agent()
    agent.kill()
    assert rig.run_dir.agent_socket.is_socket()
    with pytest.raises(AgentAbsent, match=r"not running.*pyambient up"):
        rig.ask("status")
    rig.start_agent()
    assert rig.ask("status")["pods"] == []


def test_an_agent_that_is_silent_is_not_waited_for_for_ever(rig: Rig) -> None:
    """The client's patience is bounded, and ends in one line."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(rig.run_dir.agent_socket))
        silent.listen()
        with pytest.raises(PyambientError, match="did not answer"):
            ask(rig.run_dir, "status", 0.05)


@pytest.mark.parametrize("has_read", [False, True])
def test_an_agent_that_is_killed_before_it_answers(rig: Rig, *, has_read: bool) -> None:
    """It is as absent as one that was never there: whoever can do without it goes on."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(rig.run_dir.agent_socket))
        listener.listen()

        def die() -> None:
            select.select([listener], [], [])
            if has_read:
                with listener.accept()[0] as connection:
                    connection.recv(REQUEST_LIMIT)
                    listener.close()
            else:
                listener.close()

        async def ask() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, die)
                await trio.to_thread.run_sync(rig.ask, "status")

        with pytest.RaisesGroup(pytest.RaisesExc(AgentAbsent, match="ended before it answered; ")):
            trio.run(ask)


def test_an_agent_with_too_many_clients_is_not_taken_for_absent(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives: nobody is told to start another, or goes on without it."""
    monkeypatch.setattr("pyambient.agent.api.MAX_CLIENTS", 1)
    rig.start_agent()
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(str(rig.run_dir.agent_socket))
        with pytest.raises(PyambientError, match=r"hung up.*too many clients") as refused:
            rig.ask("status")
    assert not isinstance(refused.value, AgentAbsent)


def test_a_request_that_is_too_long_is_not_taken_for_an_absent_agent(rig: Rig) -> None:
    """It is cut off, and says so."""
    rig.start_agent()
    with pytest.raises(PyambientError, match=r"hung up.*the request is too long") as refused:
        rig.ask("verify", netns="x" * 4 * REQUEST_LIMIT)
    assert not isinstance(refused.value, AgentAbsent)
