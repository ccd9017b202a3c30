"""The committed example of a report: whole, small, and what the page about it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import wording
from benchmarks.comparison import compare
from benchmarks.metrics import METRICS
from benchmarks.storage import RunFolder, read_json
from benchmarks.suites import load_suite
from tests.benchmarks.browser import browser
from tests.benchmarks.test_report import Page

OURS, THEIRS = "cogvideo-demo", "cogvideox:equal-compute"


@pytest.fixture(scope="module")
def example(root: Path) -> Path:
    return root / "docs" / "examples" / "equal_compute"


def test_it_is_small_whole_and_needs_nothing_else(example: Path) -> None:
    text = (example / "report.html").read_text(encoding="utf-8")
    assert len(text) < 1_500_000 and not Page(text).open
    assert not re.search(r'(?:src|href)="(?:https?:)?//', text)
    for name in re.findall(r'href="([^"#:]+)"', text):
        assert (example / name).is_file(), name


def test_its_numbers_are_those_of_the_page_about_it(root: Path, example: Path) -> None:
    results = read_json(example / "results.json")
    said = (root / "docs" / "equal_compute.md").read_text(encoding="utf-8")
    metric = METRICS["prompt_accuracy"]
    for model, words in ((OURS, "92 % (84 to 98)"), (THEIRS, "41 % (28 to 53)")):
        value = results["models"][model]["metrics"]["prompt_accuracy"]
        assert f"{wording.number(metric, value['value'])} ({wording.span(metric, value)[:-2]})" == words
        assert words in said
    entry = next(
        e for e in results["differences"] if (e["a"], e["b"], e["metric"]) == (OURS, THEIRS, metric.name)
    )
    assert (
        wording.number(metric, entry["value"], sign=True) == "+52 points" and "+52 points (38 to 66)" in said
    )
    assert entry["verdict"] == f"{OURS} is better" and entry["n"] == 64


def test_its_suite_is_legal_and_its_run_can_be_compared(example: Path) -> None:
    suite = load_suite(str(example / "equal-compute.json"))
    assert (suite.name, suite.num_prompts, suite.interleave) == ("equal-compute", 64, True)
    folder = RunFolder(path=example)
    found = compare(folder, folder)
    assert {"prompt_accuracy", "frechet/fixed"} < {e["metric"] for e in found if e.get("value") == 0}


def test_it_plays_in_a_browser_and_fits_a_phone(chromium: str, example: Path, tmp_path: Path) -> None:
    with browser(chromium, tmp_path) as page:
        page.open(example / "report.html")
        page.until("[...document.querySelectorAll('video')].slice(0, 5).every((film) => film.readyState > 1)")
        page.run("document.getElementById('videos').scrollIntoView({ behavior: 'instant' })")
        page.until("[...document.querySelectorAll('video')].some((film) => film.currentTime > 0.1)")
        assert page.requests == [(example / "report.html").resolve().as_uri()] and page.complaints == []
        page.open(example / "report.html", width=360, height=700)
        assert page.run("document.documentElement.scrollWidth") <= 360
