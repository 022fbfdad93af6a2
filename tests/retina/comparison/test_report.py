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
    return tables.as_markdown(report.differences(found))


def test_the_report_claims_only_what_can_be_claimed():
    first = right(0.5, 300, 1)
    rows = {"cls_single": row_of("cls_single", first, first),
            "hard": row_of("hard", *[first | right(0.4, 300, 2)] * 2)}
    found = {"configurations": {name: analysis.configuration_numbers(row) for name, row in rows.items()},
             "differences": analysis.differences(rows, [Accurate()])}
    (d,) = found["differences"]
    said = report.claim(found, d)
    assert f"{d['difference']:+.3f}" in said and "higher (these networks: a claim about" in said
    assert table_of(found).endswith("| higher |  |")
    d["claimed"], d["needed"], d["wants"] = False, 1234, None
    said = report.claim(found, d)
    assert "no difference can be shown; one as large as this would take 1234 photographs" in said
    assert "higher" not in said
    assert table_of(found).endswith("| none | 1234 photographs (here 300) |")
    assert report.measured_here(found, "hard", "_single").startswith(
        "Measured here: cls accuracy, hard minus cls_single")


def test_the_report_of_this_repository_says_what_was_measured():
    """If report.py has changed, write REPORT.md anew: text(comparison.json, pictures), as here."""
    found = json.loads((ROOT / "tests" / "comparison.json").read_text())
    pictures = {p.stem: f"docs/{report.PICTURES}/{p.name}" for p in (ROOT / "docs" / report.PICTURES).iterdir()}
    assert set(pictures) == {"comparison", *baselines.REPORTED}
    assert (ROOT / "REPORT.md").read_text() == report.text(found, pictures)


def test_intervals_of_a_row_are_those_of_evaluate():
    rows = [right(0.6, 80, k) for k in (1, 2)]
    numbers = analysis.configuration_numbers(row_of("hard", *rows))["tasks"]["cls"]["metrics"]["accuracy"]
    means = [float(r.double().mean()) for r in rows]
    assert numbers["mean"] == pytest.approx(sum(means) / 2) and numbers["values"] == pytest.approx(means)
    assert numbers["sd"] == pytest.approx(abs(means[0] - means[1]) / math.sqrt(2))
    low, high = numbers["interval"]
    assert low < numbers["mean"] < high and high - low == pytest.approx(
        2 * 1.96 * math.sqrt(0.24 / 80), rel=0.5) and statistics.RESAMPLES == 1000
