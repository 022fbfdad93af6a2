"""The comparison in words: no more is claimed than can be."""

import json
import math

import pytest
from test_analysis import Accurate, right, row_of

import baselines
from conftest import ROOT
from retina.comparison import analysis, report
from retina.evaluation import statistics, tables


pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")


def table_of(found: dict) -> str:
    return tables.as_markdown(report.difference_table(found))


def test_the_report_claims_only_what_can_be_claimed():
    first = right(0.5, 300, 1)
    rows = {"cls_single": row_of("cls_single", *[first] * 5),
            "hard": row_of("hard", *[first | right(0.4, 300, 2)] * 5)}
    found = {"configurations": {name: analysis.configuration_numbers(row) for name, row in rows.items()},
             "differences": analysis.differences(rows, [Accurate()])}
    (d,) = found["differences"]
    said = report.sentence(found, d)
    assert f"{d['difference']:+.3f}" in said and said.endswith(": higher, from n = 300 and 5 seeds a side")
    assert table_of(found).endswith("| higher |  |")
    d["claimed"], d["needed"], d["wants"] = False, 1234, None
    said = report.sentence(found, d)
    assert "no difference can be claimed from n = 300; one as large as this would take 1234 photographs" in said
    assert "higher" not in said
    assert table_of(found).endswith("| none | 1234 photographs (here 300) |")
    assert report.measured_here(found, "hard", "_single").startswith(
        "Measured here: cls accuracy, hard minus cls_single")


def test_a_report_of_few_seeds_shows_each_and_claims_nothing():
    configurations = {name: row_of(name, *(right(share, 300, k) for k in (1, 2))) for name, share in (
        ("cls_single", 0.2), ("hard", 0.8))}
    summary = analysis.summarize(configurations, [Accurate()], {
        "what": "", "asked": {name: name for name in configurations}, "failed": {}})
    shares = ", ".join(f"{float(right(0.8, 300, k).double().mean()):.3f}" for k in (1, 2))
    (d,) = summary["differences"]
    for said in (report.screen(summary), report.in_short(summary)[-1]):
        assert "no claim about ways of training: 2 seeds a side, 5 are needed" in said and "higher" not in said
    assert f", seeds {shares}" in report.score_table(summary)[2][1] and " ± " not in report.screen(summary)
    assert report.difference_table(summary)[1][-2:] == ["none", "5 seeds a side"] and d["p_adjusted"] < 0.01
    assert report.over(summary) == "eyes, for these networks"


def test_the_report_of_this_repository_says_what_was_measured():
    """If report.py has changed, write REPORT.md anew: text(comparison.json, pictures), as here."""
    found = json.loads((ROOT / "tests" / "comparison.json").read_text())
    pictures = {p.stem: f"docs/{report.PICTURES}/{p.name}" for p in (ROOT / "docs" / report.PICTURES).iterdir()}
    assert set(pictures) == {"comparison", *baselines.REPORTED}
    assert (ROOT / "REPORT.md").read_text() == report.text(found, pictures)


def test_intervals_of_a_row_are_those_of_evaluate():
    rows = [right(0.6, 80, 1)] * 4 + [right(0.6, 80, 2)]
    numbers = analysis.configuration_numbers(row_of("hard", *rows))["tasks"]["cls"]["metrics"]["accuracy"]
    means = [float(r.double().mean()) for r in rows]
    assert numbers["mean"] == pytest.approx(sum(means) / 5) and numbers["values"] == pytest.approx(means)
    assert numbers["sd"] == pytest.approx(abs(means[0] - means[4]) / math.sqrt(5))
    low, high = numbers["interval"]
    assert low < numbers["mean"] < high and high - low == pytest.approx(
        2 * 1.96 * math.sqrt(0.24 / 80), rel=0.5) and statistics.RESAMPLES == 1000
