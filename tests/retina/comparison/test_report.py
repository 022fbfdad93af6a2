"""The comparison in words: no more is claimed than can be."""

import json
import math

import pytest
from test_analysis import Accurate, measured, right, table_of

import baselines
from conftest import ROOT
from retina.comparison import analysis, report
from retina.evaluation import statistics


pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")


def test_the_report_claims_only_what_can_be_claimed():
    first = right(0.5, 300, 1)
    configurations = {"cls_single": measured("cls_single", *[first] * 5),
                      "hard": measured("hard", *[first | right(0.4, 300, 2)] * 5)}
    summary = {"configurations": {name: analysis.configuration_numbers(c) for name, c in configurations.items()},
               "differences": analysis.differences(configurations, [Accurate()])}
    (d,) = summary["differences"]
    said = report.sentence(summary, d)
    assert f"{d['difference']:+.3f}" in said and said.endswith(": higher, from n = 300 and 5 seeds a side")
    assert table_of(summary).endswith("| higher |  |")
    d["claimed"], d["needed"], d["wants"] = False, 1234, None
    said = report.sentence(summary, d)
    assert "no difference can be claimed from n = 300; one as large as this would take 1234 photographs" in said
    assert "higher" not in said
    assert table_of(summary).endswith("| none | 1234 photographs (here 300) |")
    words = report.measured_here(summary, "hard", "_single")
    assert words.startswith("Measured here: cls accuracy, hard minus cls_single")


def test_a_report_of_few_seeds_shows_each_and_claims_nothing():
    configurations = {name: measured(name, *(right(share, 300, k) for k in (1, 2)))
                      for name, share in (("cls_single", 0.2), ("hard", 0.8))}
    settings = {"what": "", "asked": {name: name for name in configurations}, "failed": {}}
    summary = analysis.summarize(configurations, [Accurate()], settings)
    shares = ", ".join(f"{float(right(0.8, 300, k).double().mean()):.3f}" for k in (1, 2))
    (d,) = summary["differences"]
    for said in (report.screen(summary), report.in_short(summary)[-1]):
        assert "no claim about ways of training: 2 seeds a side, 5 are needed" in said and "higher" not in said
    assert f", seeds {shares}" in report.score_table(summary)[2][1] and " ± " not in report.screen(summary)
    assert report.difference_table(summary)[1][-2:] == ["none", "5 seeds a side"] and d["p_adjusted"] < 0.01
    assert report.over(summary) == "eyes, for these networks"


def test_the_report_of_this_repository_says_what_was_measured():
    """If report.py has changed, write REPORT.md anew: text(comparison.json, pictures), as here."""
    summary = json.loads((ROOT / "tests" / "comparison.json").read_text())
    pictures = {p.stem: f"docs/{report.PICTURES}/{p.name}" for p in (ROOT / "docs" / report.PICTURES).iterdir()}
    assert set(pictures) == {"comparison", *baselines.REPORTED}
    assert (ROOT / "REPORT.md").read_text() == report.text(summary, pictures)


def test_intervals_of_a_configuration_are_those_of_evaluate():
    answers = [right(0.6, 80, 1)] * 4 + [right(0.6, 80, 2)]
    numbers = analysis.configuration_numbers(measured("hard", *answers))["tasks"]["cls"]["metrics"]["accuracy"]
    means = [float(r.double().mean()) for r in answers]
    assert numbers["mean"] == pytest.approx(sum(means) / 5) and numbers["values"] == pytest.approx(means)
    assert numbers["sd"] == pytest.approx(abs(means[0] - means[4]) / math.sqrt(5))
    low, high = numbers["interval"]
    assert low < numbers["mean"] < high and statistics.RESAMPLES == 1000
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.24 / 80), rel=0.5)
