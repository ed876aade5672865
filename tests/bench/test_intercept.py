"""`pyambient bench intercept`: one tiny round for real, and what is made of samples."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pyambient.bench.intercept.figures import SET_UP, lines
from pyambient.bench.intercept.table import render
from pyambient.bench.intercept.work import (
    BOTH,
    CLIENT,
    CONNECTIONS,
    DIRECT,
    DNS,
    EXPLICIT,
    SERVER,
    Subject,
    cells,
    subjects,
)
from pyambient.bench.rounds import Results

BACKENDS = ("bpf", "tc", "nftables", "iptables")
IPS = ("v4", "v6")
PATIENCE = 110


def run(directory, *arguments):
    """The benchmark as a user runs it; the samples it wrote."""
    out = directory / "intercept.json"
    command = [sys.executable, "-m", "pyambient", "bench", "intercept", "--out", str(out)]
    done = subprocess.run(
        [*command, "--rounds", "1", "--seconds", "0.05", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text("utf-8")), done.stdout


def test_a_round_captures_in_both_families(isolated, tmp_path, backend):
    """Each captured connection and query went through a proxy, and the direct ones did not."""
    choice = ("--backend", backend, "--enrolled", "client")
    content, shown = run(tmp_path, *choice, "--work", "connections", "--work", "dns")
    assert set(content["samples"]) == {f"{w}/{f}" for w in ("connections", "dns") for f in IPS}
    for work, samples in content["samples"].items():
        captured = {f"{backend}/client/null"} if (backend, work[:3]) != ("tc", "dns") else set()
        assert set(samples) == {DIRECT.name, EXPLICIT.name, *captured}
        for subject, (sample,) in samples.items():
            assert sample["errors"] == 0
            least = 0 if subject == DIRECT.name else sample["operations"]
            assert sample["captured"] >= least
            assert (sample["captured"] == 0) is (subject == DIRECT.name)
    assert f"{backend}, client" in shown


def test_the_servers_pod_and_both_are_captured(isolated, tmp_path, backend):
    """Where both pods are enrolled, both proxies see every connection."""
    choice = ("--backend", backend, "--enrolled", "server", "--enrolled", "both")
    content, _ = run(tmp_path, *choice, "--work", "connections")
    for samples in content["samples"].values():
        for enrolled in (SERVER, BOTH):
            (sample,) = samples[f"{backend}/{enrolled}/null"]
            assert sample["captured"] >= sample["operations"] > 0


def test_a_round_has_each_cell_once():
    """DNS is not measured where it is not captured, all else for every subject and family."""
    made = [(c.subject.name, c.row) for c in cells(subjects(BACKENDS, (CLIENT, SERVER)), (DNS,))]
    assert len(set(made)) == len(made) == 2 * (2 + len(BACKENDS) - 1)
    every = list(cells(subjects(BACKENDS, (CLIENT, SERVER)), (CONNECTIONS,)))
    assert len(every) == 2 * (2 + 2 * len(BACKENDS))


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
    assert (line.family, line.median, line.low, line.high) == (family, 65, 40, 90)
    assert (line.to_direct, line.to_explicit) == pytest.approx((0.35, 0.85))
    assert "bpf, client" in render(results)
