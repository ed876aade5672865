"""`pyambient bench report`: a page that needs nothing else, and tables."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from pyambient.bench.intercept.work import (
    DIRECT,
    EXPLICIT,
    OTHERS,
    Subject,
    beside,
    enrolling,
    excluding,
)
from pyambient.bench.report import machine
from pyambient.cli.main import cli

BACKENDS = ("bpf", "tc", "nftables", "iptables")
FAMILIES = ("v4", "v6")
WORK = ("connections", "ping-pong", "bulk", "dns", "held")


def samples():
    """Three rounds of all that a run measures; each backend is slower than the one before."""
    made = {}
    for number, (cost, backend) in itertools.product(range(3), enumerate(BACKENDS, 2)):
        for row, subject, sample in measured(backend, cost, number):
            made.setdefault(row, {}).setdefault(subject, []).append(sample)
    return made


def measured(backend, cost, number):
    """What a round has of one backend."""
    sample = {
        "seconds": 1,
        "operations": 1000 // cost + number,
        "bytes": 1e9 / cost,
        "p50": 20 * cost,
        "cpu": 1,
    }
    captured = Subject(backend, "client").name
    for family, work in itertools.product(FAMILIES, WORK):
        row = f"{work}/{family}"
        if backend == "bpf":
            yield row, DIRECT.name, {**sample, "operations": 1000, "p50": 10}
            yield row, EXPLICIT.name, {**sample, "operations": 500, "p50": 30}
        for enrolled in ("client", "server", "both", OTHERS):
            yield row, Subject(backend, enrolled).name, sample
        yield row, Subject(backend, "client", "real").name, sample
    for family, count in itertools.product(FAMILIES, (0, 100)):
        yield excluding(count, family), captured, sample
    for count, subject in itertools.product((1, 10), (EXPLICIT.name, captured)):
        yield beside(count, backend), subject, sample
    for place in (1, 200):
        yield enrolling(place), backend, {"enrol": 0.004 * cost, "free": 0.01}


def content(made):
    return {"machine": machine(), "settings": {"rounds": 3, "seconds": 1.0}, "samples": made}


def report(directory, made, code=0):
    source, out = directory / "intercept.json", directory / "pages" / "intercept.html"
    source.write_text(json.dumps(made) if isinstance(made, dict) else made, "utf-8")
    done = CliRunner().invoke(cli, ["bench", "report", "--in", str(source), "--out", str(out)])
    assert done.exit_code == code, done.output
    return done.output, out


class Page(HTMLParser):
    """The headings and the drawings, and whatever would be fetched from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.drawings, self.fetched = [], [], []
        self._in_heading = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self._in_heading = tag == "h2"
        if tag == "svg":
            self.drawings.append(named["aria-label"])
        if tag in ("script", "link", "img", "iframe"):
            self.fetched.append(tag)
        self.fetched += [v for n, v in attrs if n in ("src", "href", "xlink:href") and v[0] != "#"]

    def handle_data(self, data):
        if self._in_heading:
            self.headings.append(data)
            self._in_heading = False


def test_the_page_draws_all_that_was_measured_and_needs_nothing_else(tmp_path):
    """No request leaves the reader's machine, and each colour is the page's, light or dark."""
    shown, out = report(tmp_path, content(samples()))
    text = out.read_text("utf-8")
    page = Page(text)
    assert page.fetched == []
    assert page.headings == [
        *("Bars", "Connection set-up", "CPU per connection", "Ping-pong, p50", "Bulk"),
        *("DNS over UDP, p50", "Ping-pong beside 1000 held, p50", "Pods that are not enrolled"),
        *("With pyambient's own proxy", "More pods", "More exclusions", "Enrolment"),
    ]
    assert len(page.drawings) == len(page.headings) - 1
    used = set(re.findall(r"var\(--([a-z]+)\)", text))
    assert used <= set(re.findall(r"--([a-z]+):", text))
    assert set(BACKENDS) <= used
    assert not re.search(r"#0a0b\w\w", text)
    assert "| enrolment, ms" in shown
    assert str(out) in shown.splitlines()[-1]


def test_what_was_not_measured_is_left_out(tmp_path):
    """Of a run of one kind of work there is one drawing, and no bar of the others."""
    every = samples()
    _, out = report(tmp_path, content({row: every[row] for row in ("bulk/v4", "bulk/v6")}))
    page = Page(out.read_text("utf-8"))
    assert page.headings == ["Bulk"]


def test_a_page_without_matplotlib_is_one_line_of_advice(tmp_path):
    """The tables are shown all the same."""
    source, out = tmp_path / "intercept.json", tmp_path / "intercept.html"
    source.write_text(json.dumps(content(samples())), "utf-8")
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pyambient.cli.main import cli\n"
        f"cli.main(['bench', 'report', '--in', {str(source)!r}, '--out', {str(out)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], text=True, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert "| enrolment, ms" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "matplotlib is not installed; run pip install 'pyambient[report]'" in line
    assert not out.exists()


@pytest.mark.parametrize("text", ["{}", "[]", "nothing", '{"samples": 1}'])
def test_a_file_of_something_else_is_one_line(tmp_path, text):
    shown, _ = report(tmp_path, text, code=1)
    (line,) = shown.splitlines()
    assert "is not what 'bench intercept' writes" in line


def test_without_a_run_there_is_nothing_to_draw(tmp_path):
    done = CliRunner().invoke(cli, ["bench", "report", "--in", str(tmp_path / "none.json")])
    assert done.exit_code == 2
    assert "run 'sudo pyambient bench intercept' first" in done.output
