"""`pyambient bench intercept`: one tiny round for real, and what is made of samples."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest

from pyambient.bench.intercept.bars import BARS
from pyambient.bench.intercept.figures import (
    SET_UP,
    by_exclusions,
    by_pods,
    lines,
    milliseconds,
    percentile,
    places,
)
from pyambient.bench.intercept.plan import shuffled, subjects, traffic
from pyambient.bench.intercept.settings import Settings
from pyambient.bench.intercept.table import render
from pyambient.bench.intercept.work import (
    BOTH,
    CLIENT,
    DIRECT,
    EXPLICIT,
    NULL,
    OTHERS,
    REAL,
    SERVER,
    Subject,
    beside,
    enrolling,
    excluding,
)
from pyambient.bench.rounds import Results
from pyambient.intercept.mounts import find_cgroup2_root

BACKENDS = ("bpf", "tc", "nftables", "iptables")
IPS = ("v4", "v6")
PATIENCE = 110
_ENDLESS = ("--quick", "--part", "exclusions", "--backend", "bpf", "--rounds", "1000")


def run(directory, *arguments, code=0):
    """The benchmark as a user runs it: what it wrote, what it printed, what it complained of."""
    out = directory / "intercept.json"
    command = [sys.executable, "-m", "pyambient", "bench", "intercept", "--out", str(out)]
    done = subprocess.run(
        [*command, "--quick", "--rounds", "1", "--seconds", "0.05", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return json.loads(out.read_text("utf-8")), done.stdout, done.stderr


def test_a_round_captures_in_both_families(isolated, tmp_path, backend):
    """Each captured connection and query went through a proxy, and the direct ones did not."""
    choice = ("--backend", backend, "--enrolled", "client")
    works = ("--part", "traffic", "--work", "connections", "--work", "dns")
    content, shown, _ = run(tmp_path, *choice, *works)
    assert set(content["samples"]) == {f"{w}/{f}" for w in ("connections", "dns") for f in IPS}
    for samples in content["samples"].values():
        assert set(samples) == {DIRECT.name, EXPLICIT.name, f"{backend}/client/null"}
        for subject, (sample,) in samples.items():
            assert sample["errors"] == 0
            least = 0 if subject == DIRECT.name else sample["operations"]
            assert sample["captured"] >= least
            assert (sample["captured"] == 0) is (subject == DIRECT.name)
    assert f"{backend}, client" in shown


def test_the_servers_pod_and_both_are_captured(isolated, tmp_path, backend):
    """Where both pods are enrolled, both proxies see every connection."""
    choice = ("--backend", backend, "--enrolled", "server", "--enrolled", "both")
    content, _, _ = run(tmp_path, *choice, "--part", "traffic", "--work", "connections")
    for samples in content["samples"].values():
        for enrolled in (SERVER, BOTH):
            (sample,) = samples[f"{backend}/{enrolled}/null"]
            assert sample["captured"] >= sample["operations"] > 0


def test_pods_that_are_not_enrolled_stay_outside(isolated, tmp_path, backend):
    """Another pod of the node is enrolled and served; its proxy sees nothing of theirs."""
    choice = ("--backend", backend, "--enrolled", "others", "--part", "traffic")
    content, _, _ = run(tmp_path, *choice, "--work", "connections", "--work", "dns")
    assert len(content["samples"]) == 4
    for samples in content["samples"].values():
        (sample,) = samples[Subject(backend, OTHERS).name]
        assert sample["operations"] > 0
        assert sample["captured"] == sample["errors"] == 0


def test_the_real_proxy_serves_a_cell(isolated, tmp_path, backend):
    """It is its CPU that tells that what was measured went through it."""
    choice = ("--backend", backend, "--proxy", "real", "--enrolled", "both")
    works = ("--part", "traffic", "--work", "connections")
    content, _, _ = run(tmp_path, *choice, *works)
    for samples in content["samples"].values():
        (sample,) = samples[Subject(backend, BOTH, REAL).name]
        assert sample["captured"] == sample["operations"] > 0
        assert sample["errors"] == 0


def test_cost_and_time_of_more(isolated, tmp_path, backend):
    """Exclusions, other pods and enrolments, each counted from few to more."""
    parts = ("--part", "exclusions", "--part", "pods", "--part", "enrolment")
    content, shown, _ = run(tmp_path, "--backend", backend, *parts)
    results = Results()
    results.samples = content["samples"]
    assert [list(g.costs) for g in by_exclusions(results)] == [[0, 100], [0, 100]]
    assert [list(g.costs) for g in by_pods(results)] == [[1, 4]]
    assert places(results) == [1, 4]
    assert all(len(milliseconds(results, place, backend)) == 5 for place in (1, 4))
    assert "excluded CIDRs" in shown
    assert "pod 4" in shown


def test_check_names_what_falls_short_and_add_keeps_it(isolated, tmp_path):
    """A bar that a former run missed is still missed when nothing but more rounds are added."""
    choice = ("--backend", "bpf", "--part", "traffic", "--work", "ping-pong")
    before, _, _ = run(tmp_path, *choice)
    samples = before["samples"]["ping-pong/v4"]
    for _ in range(9):
        for subject in samples:
            slow = 1000 if subject.startswith("bpf") else 1
            number = len(samples[subject]) + 1
            samples[subject].append({**samples[subject][0], "p50": slow, "round": number})
    (tmp_path / "intercept.json").write_text(json.dumps(before), "utf-8")
    after, _, complaint = run(tmp_path, *choice, "--add", "--check", code=1)
    assert len(after["samples"]["ping-pong/v4"][DIRECT.name]) == 11
    assert "ping-pong, to explicit, IPv4" in complaint.splitlines()[-1]


def test_a_benchmark_that_is_ended_leaves_no_cgroup(isolated, tmp_path):
    """SIGTERM in the midst of a cell, whose hooks are on the sub-tree."""
    out = tmp_path / "intercept.json"
    command = [sys.executable, "-m", "pyambient", "bench", "intercept", "--out", str(out)]
    process = subprocess.Popen([*command, *_ENDLESS])
    subtree = find_cgroup2_root() / f"pyambient-bench-{process.pid}"
    try:
        deadline = time.monotonic() + PATIENCE
        while not out.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        assert subtree.is_dir()
        process.terminate()
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert not subtree.exists()


def settings(**fields):
    whole = Settings(
        *("out", BACKENDS, (CLIENT, SERVER), (NULL,), ("connections", "dns")),
        *((0, 100), (1,), (1,), 1, 1, 1.0),
    )
    return dataclasses.replace(whole, **fields)


def test_a_round_has_each_cell_once():
    """DNS is not measured where it is not captured, all else for every subject and family."""
    groups = traffic(settings(work=("dns",), excluded=()))
    assert [len(group) for group in groups] == [2 + len(BACKENDS)] * 2
    groups = traffic(settings(work=("connections",), excluded=()))
    assert [len(group) for group in groups] == [2 + 2 * len(BACKENDS)] * 2
    for group in traffic(settings()):
        made = [(cell.subject.name, cell.row) for cell in group]
        assert len(set(made)) == len(made)


def test_a_round_is_shuffled_and_what_is_compared_stays_together():
    """The order is another one in each round, and the same for the same round."""
    groups = traffic(settings())
    first, second = shuffled(groups, 0), shuffled(groups, 1)
    assert first != second
    assert first == shuffled(groups, 0)
    assert sorted(map(repr, map(set_of, first))) == sorted(map(repr, map(set_of, second)))


def set_of(group):
    return sorted((cell.row, cell.subject.name) for cell in group)


def test_pods_that_nobody_enrolled_have_no_proxy_of_ours():
    """A real proxy that serves others would cost them nothing else than the one in C does."""
    chosen = subjects(("bpf",), (CLIENT, OTHERS), (NULL, REAL))
    assert [s.proxy for s in chosen if s.enrolled == OTHERS] == [NULL]


@pytest.mark.parametrize(("family", "row"), [("v4", "connections/v4"), ("v6", "connections/v6")])
def test_a_figure_has_its_spread_and_both_ratios(family, row):
    """The ratios are to direct and to explicit of the same round."""
    results = Results()
    rates = {
        DIRECT.name: (100, 300),
        EXPLICIT.name: (50, 100),
        Subject("bpf", CLIENT).name: (40, 90),
    }
    for subject, values in rates.items():
        for value in values:
            results.add(row, subject, {"seconds": 1, "operations": value, "cpu": 1})
    (line,) = [
        line for line in lines(results) if line.figure is SET_UP and line.subject.startswith("bpf")
    ]
    assert (line.family, line.values.median) == (family, 65)
    assert (line.values.least, line.values.most) == (40, 90)
    assert (line.to_direct.median, line.to_explicit.median) == pytest.approx((0.35, 0.85))
    assert "bpf, client" in render(results)


def test_a_cost_grows_against_the_least():
    """Of pods it is freed of what slows all down; of exclusions it is the same subject's."""
    results = Results()
    bpf = Subject("bpf", CLIENT).name
    for count, slower, cost in ((1, 1, 2), (500, 3, 3)):
        for subject, cpu in ((EXPLICIT.name, slower), (bpf, slower * cost)):
            results.add(beside(count, "bpf"), subject, {"operations": 1, "cpu": cpu})
    (growth,) = by_pods(results)
    assert [spread.median for spread in growth.costs.values()] == [1, 1.5]
    for count, cpu in ((0, 2), (100, 5)):
        results.add(excluding(count, "v6"), bpf, {"operations": 1, "cpu": cpu})
    (growth,) = by_exclusions(results)
    assert (growth.family, [s.median for s in growth.costs.values()]) == ("v6", [1, 2.5])


@pytest.mark.parametrize(("part", "found"), [(0, 1), (0.5, 50), (0.99, 99), (1, 100)])
def test_a_percentile_is_one_of_the_values(part, found):
    assert percentile(range(1, 101), part) == found


@pytest.mark.parametrize("slowest", [9.9, 24, 26])
def test_an_enrolment_has_its_bars(slowest):
    """Half of them within 10 ms, 99 of 100 within 25 ms."""
    results = Results()
    for took in (*[9] * 98, slowest, slowest):
        results.add(enrolling(1), "bpf", {"enrol": took / 1e3, "free": 0.01})
    short = [row.name for row in BARS if row.short(results)]
    assert short == (["enrolling the 1st pod, p99"] if slowest > 25 else [])
