"""Scores of others and items that are left out: both have their own part of every report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.elsewhere import imported_tables
from benchmarks.human_study import FORMS, import_scores, make_study
from benchmarks.report import write_reports
from benchmarks.storage import RunFolder, read_json
from benchmarks.vbench import export_run, import_results
from tests.benchmarks.test_report import Page

VBENCH = {"motion_smoothness": [0.9815, [{"video_path": "a-0.mp4", "video_results": 0.9815}]]}


def answered(key: dict[str, Any], rater: str, sheet: int) -> dict[str, Any]:
    """A rater who finds every left video middling, every right one best, and prefers it."""
    questions = FORMS[key["form"]].questions
    left, right = ({q.name: q.options[place][1] for q in questions} for place in (0, -1))
    answers = [
        {"pair": place["pair"], "left": left, "right": right, "preference": "right"}
        for place in key["sheets"][sheet - 1]
    ]
    same = {name: key[name] for name in ("format", "study", "form")}
    return {**same, "sheet": sheet, "rater": rater, "answers": answers}


@pytest.fixture
def judged(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A run with VBench scores of both models and a study by two raters."""
    path = tmp_path / "x_eval_results.json"
    for model in ("good", "poor"):
        export_run(finished_run, model, tmp_path / model)
        path.write_text(json.dumps(VBENCH), encoding="utf-8")
        manifest = tmp_path / model / "vbench.json"
        import_results(finished_run, model, path, manifest=manifest, made_with="VBench 0.1.5")
    key = make_study(finished_run, tmp_path / "study", form="cogvideox", raters=2)
    import_scores(finished_run, key, [answered(key, "ann", 1), answered(key, "bob", 2)])
    return finished_run


def test_imported_scores_stand_in_every_report_and_in_no_column_of_ours(judged: RunFolder) -> None:
    results = write_reports(judged)
    vbench, study = imported_tables(results)
    assert vbench.title == "VBench, short branch" and "VBench 0.1.5" in vbench.facts[0]
    assert vbench.header == ["dimension", "good", "poor"]
    assert vbench.rows == [["motion smoothness", "0.9815 (1 video)", "0.9815 (1 video)"]]
    assert [row[0] for row in study.rows][-1] == "total" and "2 raters, 6 pairs" in study.facts[0]
    assert any("preferred to poor" in words for words in study.findings)
    html, markdown, latex = (
        (judged.path / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "md", "tex")
    )
    for text in (html, markdown, latex):
        assert "0.9815" in text and "VBench, short branch" in text and "Human study, cogvideox form" in text
    assert html.index('id="numbers"') < html.index('id="elsewhere"') < html.index('id="codecs"')
    assert "elsewhere" in html[html.index("0.9815") - 3000 : html.index("0.9815")]
    assert not Page(html).open
    assert "motion_smoothness" not in {n for row in results["models"].values() for n in row["metrics"]}


def test_scores_of_other_branches_get_tables_of_their_own(judged: RunFolder) -> None:
    results = read_json(judged.path / "results.json") | {"imported": {}}
    one = {"kind": "vbench", "model": "good", "branch": "short", "made_with": "a", "scores": {},
           "samples_per_prompt": 5, "prompts_sha256": "0"}  # fmt: skip
    results["imported"] = {"x": one, "y": {**one, "branch": "long"}, "z": {**one, "model": "poor"}}
    short, long = imported_tables(results)
    assert short.header == ["dimension", "good", "poor"] and long.header == ["dimension", "good"]


def test_a_run_without_them_has_no_such_parts(reported: RunFolder) -> None:
    for suffix in ("html", "md", "tex"):
        text = (reported.path / f"report.{suffix}").read_text(encoding="utf-8")
        assert "easured elsewhere" not in text and "Left out" not in text


def test_damaged_items_are_listed_with_their_reasons(finished_run: RunFolder) -> None:
    frames = next(finished_run.videos("good").glob("*.mkv"))
    frames.write_bytes(b"not a video")
    results = write_reports(finished_run)
    (name,) = results["failed"]
    note = "1 item is damaged or failed, and left out of every number"
    assert any(note in words for words in results["notes"])
    html, markdown = (
        (finished_run.path / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "md")
    )
    part = html[html.index('id="failed"') :]
    assert name in part and "cannot read the video" in part and note in part
    assert "## Left out" in markdown and f"| {name} | " in markdown
    assert not Page(html).open
