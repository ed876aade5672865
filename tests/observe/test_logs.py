"""The programs' own log."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from pyambient.errors import UsageError
from pyambient.observe.logs import configure, get_logger


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged, without the time."""
    taken: list[str] = []
    configure("plain", "info", lambda line: taken.append(line.partition("\t")[2]))
    yield taken
    configure("plain")


def test_levels_in_ztunnels_names(lines: list[str]) -> None:
    """What structlog calls a warning is ztunnel's warn, and critical is an error."""
    log = get_logger("mesh")
    log.info("one", pod="a")
    log.warning("two")
    log.error("three")
    log.critical("four")
    assert lines == [
        'info\tmesh\tone\tpod="a"',
        "warn\tmesh\ttwo\t",
        "error\tmesh\tthree\t",
        "error\tmesh\tfour\t",
    ]


def test_less_than_the_level_is_not_logged(lines: list[str]) -> None:
    """At level info nobody sees debug lines."""
    get_logger("mesh").debug("hidden")
    assert lines == []


def test_level_changes_for_loggers_made_before(lines: list[str]) -> None:
    """A module's logger follows what is configured after its import, either way."""
    log = get_logger("mesh")
    configure("plain", "debug", lines.append)
    log.debug("shown")
    configure("plain", "error", lines.append)
    log.warning("hidden")
    assert len(lines) == 1
    assert lines[0].endswith("\tdebug\tmesh\tshown\t")


def test_bound_fields_come_first(lines: list[str]) -> None:
    """A connection's logger carries its fields."""
    get_logger("proxy").bind(pod="a").info("accepted", port=80)
    assert lines == ['info\tproxy\taccepted\tpod="a" port=80']


def test_context_variables_are_logged(lines: list[str]) -> None:
    """What a trio task bound to its context stands in every line of it."""
    with structlog.contextvars.bound_contextvars(connection=7):
        get_logger("proxy").info("accepted")
    assert lines == ["info\tproxy\taccepted\tconnection=7"]


def test_exception_is_one_line(lines: list[str]) -> None:
    """A traceback is escaped into its line."""
    try:
        int("bad\nfile")
    except ValueError:
        get_logger("mesh").exception("cannot load")
    (line,) = lines
    assert line.startswith('error\tmesh\tcannot load\texception="Traceback (most recent call last)')
    assert r"\nValueError: invalid literal for int()" in line
    assert "\n" not in line


def test_json(lines: list[str]) -> None:
    """The other layout, with the same scope and level."""
    configure("json", emit=lines.append)
    get_logger("agent").warning("lost", pods=2)
    found = json.loads(lines[0])
    assert (found["level"], found["scope"], found["message"]) == ("warn", "agent", "lost")
    assert found["pods"] == 2


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Unless told otherwise lines go to stderr, and stdout is left to the command."""
    configure("plain")
    get_logger("cli").info("hello")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\tinfo\tcli\thello\t\n")


def test_wrong_settings(lines: list[str]) -> None:
    """A format or level that does not exist changes nothing."""
    for log_format, level in (("xml", "info"), ("plain", "loud")):
        with pytest.raises(UsageError):
            configure(log_format, level)
    get_logger("mesh").info("still")
    assert lines == ["info\tmesh\tstill\t"]


def test_structlog_is_imported_late() -> None:
    """A program that logs nothing does not pay for the import."""
    program = (
        "import sys; from pyambient.observe.logs import configure, get_logger\n"
        "configure('json', 'debug'); get_logger('cli')\n"
        "sys.exit('structlog' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_repr() -> None:
    """A logger says whose it is."""
    assert repr(get_logger("mesh")) == "<Logger mesh>"
