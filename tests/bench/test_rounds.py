"""Statistics of benchmarks."""

from __future__ import annotations

from pyambient.bench.rounds import Results, turns


def test_a_ratio_is_taken_within_a_round():
    """What slows both subjects down in one round does not move the ratio."""
    results = Results()
    for ours, theirs in ((1, 2), (10, 20), (3, 6)):
        results.add("work", "ours", {"x": ours})
        results.add("work", "theirs", {"x": theirs})
    assert results.ratio("work", "ours", "theirs", lambda sample: sample["x"]) == 0.5
    assert results.median("work", "ours", lambda sample: sample["x"]) == 3


def test_rounds_that_one_subject_missed_are_no_halves_of_a_ratio():
    """A run may have been of other subjects: what it measured has the number of its round."""
    results = Results()
    for number, ours, theirs in ((1, None, 10), (2, 20, 10), (3, None, 10), (4, 8, 2)):
        if ours:
            results.add("work", "ours", {"x": ours, "round": number})
        results.add("work", "theirs", {"x": theirs, "round": number})
    one, other = ("work", "ours"), ("work", "theirs")
    assert results.ratios(one, other, lambda sample: sample["x"]) == [2, 4]


def test_what_was_not_measured_has_no_figure():
    """A row whose work did not run is absent, not zero."""
    results = Results()
    results.add("work", "ours", {"x": 1})
    assert results.ratio("work", "ours", "theirs", lambda sample: sample["x"]) is None
    assert results.median("other", "ours", lambda sample: sample["x"]) is None


def test_every_subject_comes_first_in_its_turn():
    """The order changes from round to round, so that no subject always follows the same one."""
    assert list(turns("abc", 4)) == [list("abc"), list("bca"), list("cab"), list("abc")]
