"""A run's videos under VBench's names, and VBench's scores beside the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.report import write_reports
from benchmarks.runner import run_suite
from benchmarks.storage import RunFolder, read_json
from benchmarks.suites import Suite, items
from benchmarks.vbench import ANY_PROMPT, DIMENSIONS, branch_of, export_run, import_results, video_name
from shared.errors import SettingError
from shared.video_io import read_video
from tests.benchmarks.conftest import Models

RESULTS = {
    "motion_smoothness": [0.98, [{"video_path": "a-0.mp4", "video_results": 0.98}]],
    "dynamic_degree": [0.5, []],
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "x_eval_results.json"
    path.write_text(json.dumps(RESULTS), encoding="utf-8")
    return path


def test_the_branch_follows_the_duration() -> None:
    assert [branch_of(s) for s in (2.0, 3.3, 4.99, 5.0, 49 / 8)] == [
        "short",
        "short",
        "short",
        "long",
        "long",
    ]
    assert set(ANY_PROMPT["long"]) < set(ANY_PROMPT["short"]) < set(DIMENSIONS) and len(DIMENSIONS) == 16


def test_export_has_the_names_and_what_must_be_known(
    suite: Suite, reported: RunFolder, tmp_path: Path
) -> None:
    made = export_run(reported, "good", tmp_path)
    wanted = {f"{item.prompt}-{item.sample}.mp4" for item in items(suite)}
    assert {path.name for path in (tmp_path / "videos").iterdir()} == wanted
    said = read_json(tmp_path / "vbench.json")
    assert said == json.loads(json.dumps(made)) and said["branch"] == "short"
    assert said["environment"]["torch"] and "static videos only" in said["notes"][-1]
    prompts = read_json(tmp_path / "prompts.json")
    for path, prompt in prompts.items():
        assert Path(path).name.startswith(prompt)
        assert read_video(tmp_path / path).num_frames == said["video"]["frames"]


def test_long_videos_go_to_the_other_branch(
    suite: Suite, folder: RunFolder, models: Models, tmp_path: Path
) -> None:
    models["good"].fps = 2.0
    run_suite(suite, folder, build=models.__getitem__, quiet=True)
    made = export_run(folder, "good", tmp_path / "out")
    assert made["branch"] == "long" and made["mode"] == "long_custom_input"
    assert "human_action" not in made["dimensions"]


def test_prompts_that_are_no_file_names() -> None:
    with pytest.raises(SettingError, match="slash"):
        video_name("either/or", 0)
    with pytest.raises(SettingError, match="more than 255"):
        video_name("红" * 90, 0)


def test_scores_come_back_beside_the_run_and_nowhere_else(
    finished_run: RunFolder, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "out", str(finished_run.path)
    assert main(["vbench", "export", run, "--model", "good", "--output_path", str(out)]) == 0
    words = ["--manifest", str(out / "vbench.json"), "--made-with", "VBench 0.1.5, torch 2.0.1"]
    assert main(["vbench", "import", run, str(results), "--model", "good", *words]) == 0
    assert "motion_smoothness: 0.9800" in capsys.readouterr().out
    written = write_reports(finished_run)
    kept = written["imported"]["vbench-good"]
    assert kept["scores"] == {
        "motion_smoothness": {"value": 0.98, "n": 1},
        "dynamic_degree": {"value": 0.5, "n": None},
    }
    assert kept["branch"] == "short" and kept["made_with"].startswith("VBench") and "imported" in kept["note"]
    assert not any("smoothness" in metric for metric in written["models"]["good"]["metrics"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"motion_smoothnes": [0.9, []]}, "nearest: 'motion_smoothness'"),
        ({"scene": ["good", []]}, "scene has no score"),
        ({}, "holds no results"),
    ],
)
def test_other_files_are_refused(
    finished_run: RunFolder, results: Path, content: dict[str, object], reason: str
) -> None:
    results.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SettingError, match=reason):
        import_results(finished_run, "good", results)


def test_scores_of_other_videos_are_refused(
    suite: Suite, finished_run: RunFolder, models: Models, results: Path, tmp_path: Path
) -> None:
    export_run(finished_run, "poor", tmp_path)
    with pytest.raises(SettingError, match="manifest is of 'poor'"):
        import_results(finished_run, "good", results, manifest=tmp_path / "vbench.json")
    models["poor"].wrong_from, models["poor"].steps = 0, 5
    run_suite(suite, finished_run, build=models.__getitem__, quiet=True)
    with pytest.raises(SettingError, match="not those that were exported"):
        import_results(finished_run, "poor", results, manifest=tmp_path / "vbench.json")
