"""The arithmetic of the benchmarks: what a ratio is, what tables say, what a report writes."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import report, timing
from benchmarks.report import Row

STEP = {"gradengine": 0.25, "PyTorch nchw": 0.75, "PyTorch nhwc": 0.5, "PyTorch nhwc bf16": 0.2}
ROWS = [
    Row(report.LIMITS, report.PEAK, {"gradengine": 1e-3}, flop=4e8),
    Row(report.LIMITS, report.COPY, {"gradengine": 0.1}, moved=4e9),
    Row("ResNet-18", "training step", STEP, flop=5e10),
    Row("ResNet-18", "unaccompanied", {"gradengine": 2e-6}),
    Row("Passes", "add", {"gradengine": 0.2, "PyTorch nhwc": 0.1}, moved=4e9),
]
ABOUT = {"date": "2026-01-02", "cores": 2, "processor": "A CPU", "vectors": "", "python": "3.11"}


def test_the_ratio_is_against_the_fastest_float32_peer():
    assert ROWS[2].best_peer == ("PyTorch nhwc", 0.5)
    assert ROWS[2].ratio == 2.0
    assert ROWS[3].ratio is None


def test_a_table_has_a_column_for_every_peer_and_a_share_of_the_limit():
    limits = report.measured_limits(ROWS)
    assert limits == pytest.approx({report.PEAK: 400.0, report.COPY: 40.0})
    heading, step, alone = report.table(ROWS[2:4], limits)
    assert heading == ["", *STEP, "ratio", "rate"]
    peers = ["750 ms (3.00)", "500 ms (2.00)", "200 ms (0.80)"]
    assert step[1:] == ["250 ms", *peers, "2.00", "200 GFLOP/s (50%)"]
    assert alone == ["unaccompanied", "2.00 µs", "", "", "", "", ""]
    assert report.table(ROWS[4:], limits)[1][-2:] == ["0.50", "20 GB/s (50%)"]
    assert report.table(ROWS[4:], {})[1][-1] == "20 GB/s"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12.34, "s", "12.3 s"),
        (0.9999, "s", "1.00 s"),
        (0.0346, "s", "34.6 ms"),
        (3e-6, "s", "3.00 µs"),
        (2e-10, "s", "0.20 ns"),
        (1234.5, "MB", "1234 MB"),
    ],
)
def test_quantities_have_three_digits_and_a_unit_that_fits(value: float, unit: str, text: str):
    assert report.quantity(value, unit) == text


def test_a_report_replaces_what_stands_between_the_marks(tmp_path: Path):
    start, end = report.MARKS
    text = f"before\n{start}\nold\n{end}\nafter\n"
    written = report.with_table(text, ABOUT, ROWS, tmp_path / "a-cpu.json")
    assert re.fullmatch(rf"before\n{start}\n.*\n{end}\nafter\n", written, re.DOTALL)
    assert "old" not in written
    assert "| training step | 250 ms |" in written
    assert "| add |" not in written  # its group is in the long table only
    assert "400 GFLOP/s" in written
    assert report.with_table(written, ABOUT, ROWS, tmp_path / "a-cpu.json") == written
    with pytest.raises(ValueError, match="must hold the marks once"):
        report.with_table("no marks", ABOUT, ROWS, tmp_path / "a-cpu.json")


def test_readme_has_a_place_for_the_report():
    for mark in report.MARKS:
        assert report.README.read_text().count(mark) == 1


def test_a_file_of_results_becomes_a_table_and_a_plot(tmp_path: Path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text("\n".join(report.MARKS))
    path = tmp_path / "a-cpu.json"
    path.write_text(json.dumps({"about": ABOUT, "rows": [asdict(row) for row in ROWS]}))
    report.publish(path)
    tables = path.with_suffix(".md").read_text()
    assert tables.index("| training step |") < tables.index(report.COPY) < tables.index("| add |")
    plot = path.with_suffix(".svg").read_text()
    assert "training step" in plot
    assert "unaccompanied" not in plot
    assert "training step" in report.README.read_text()


def test_a_race_calls_everyone_in_turn_and_returns_medians(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "seconds_of", lambda run: run() or 1.0 + len(calls))
    runs = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    # First each runs once untimed, so that the clock above reads 4, 6 and 8 in a's turns.
    assert timing.race(runs, seconds=0.0, pause=0.0) == {"a": 6.0, "b": 7.0}
    assert calls == ["a", "b"] * 4


def test_a_turn_of_short_runs_begins_untimed(monkeypatch):
    times = iter([0.009, *[0.005] * 99])
    monkeypatch.setattr(timing, "seconds_of", lambda run: next(times))
    assert timing.take_turn(lambda: None, pause=0.0) == [0.005] * 5
    assert next(times, None) == 0.005


def test_a_turn_of_a_long_run_is_that_run(monkeypatch):
    times = iter([0.5])
    monkeypatch.setattr(timing, "seconds_of", lambda run: next(times))
    assert timing.take_turn(lambda: None, pause=0.0) == [0.5]
