"""The report's further parts: LaTeX, the cost model, what was skipped, published scores, its size."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import media, page, registry, wording
from benchmarks.expected import cost_model
from benchmarks.latex import escaped, latex
from benchmarks.metrics import METRICS
from benchmarks.page import prompt_rows, render_page
from benchmarks.plots import memory_curves, quality_and_cost, roofline
from benchmarks.published import PUBLISHED
from benchmarks.report import markdown, write_reports
from benchmarks.storage import RunFolder
from benchmarks.suites import Suite
from shared.costs import Part, StageCost
from shared.video import Video

WORK = Part(kind="matmul", flops=3_200_000_000, moved=10**7)
STAGE = StageCost(
    name="model", net="net", unit="steps", steps=4, parts=(WORK,), weights=2**20, streamed=2**20
)
COSTS = {"good": cost_model([STAGE], torch.float32)}


@pytest.fixture(scope="module")
def results(reported: RunFolder) -> dict[str, Any]:
    return json.loads((reported.path / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(reported: RunFolder) -> str:
    return (reported.path / "report.html").read_text(encoding="utf-8")


# ---- LaTeX


def test_latex_tables_are_whole(reported: RunFolder, results: dict[str, Any]) -> None:
    written = (reported.path / "report.tex").read_text(encoding="utf-8")
    assert written == latex(results)
    for name in ("table", "tabular"):
        assert written.count(rf"\begin{{{name}}}") == written.count(rf"\end{{{name}}}") == 3
    for body in re.findall(r"\\begin\{tabular\}\{(l+)\}\n\\toprule\n(.*?)\\bottomrule", written, re.DOTALL):
        rows = [line for line in body[1].splitlines() if line.endswith(r"\\")]
        assert rows and all(len(re.findall(r"(?<!\\)&", row)) == len(body[0]) - 1 for row in rows)
    assert r"Prompt accuracy $\uparrow$ & 100 \%" in written
    assert f"% prompt_accuracy: recipe {METRICS['prompt_accuracy'].recipe_id}, n = 3" in written


def test_latex_shows_what_it_is_given() -> None:
    assert escaped("a_b & 50 % of $5 {x}\n#1 ~^\\") == (
        r"a\_b \& 50 \% of \$5 \{x\} \#1 \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )


# ---- the cost model


def test_the_cost_model_stands_beside_what_was_measured(finished_run: RunFolder) -> None:
    results = write_reports(finished_run, costs=COSTS)
    stage = results["models"]["good"]["cost_model"]["model"]
    assert stage["flops"] == 3_200_000_000 and stage["least_seconds"]["CPU core"] == pytest.approx(3.2 / 96)
    assert results["models"]["poor"]["cost_model"] == {}
    shown = (finished_run.path / "report.html").read_text(encoding="utf-8")
    assert "3.2 GFLOP</td>" in shown and "16 GFLOP/s" in shown  # of 0.2 measured seconds
    assert "| good | model | 4 steps | 3.2 GFLOP |" in markdown(results)


def test_the_demo_models_have_costs_when_run_with_their_own_settings() -> None:
    sizes = {"num_frames": 17, "height": 64, "width": 64, "dtype": "float32"}
    own = {**sizes, "num_inference_steps": 25, "guidance_scale": 3.0}
    found = registry.cost_models({"cogvideox-demo": {"settings": own}, "unknown": {"settings": own}})
    assert found.keys() == {"cogvideox-demo"}
    assert found["cogvideox-demo"]["model"]["steps"] == 25
    other = {"cogvideox-demo": {"settings": {**own, "num_inference_steps": 9}}}
    assert registry.cost_models(other) == {}


# ---- numbers and what is beside them


def test_every_number_names_its_recipe_count_and_seeds(text: str, results: dict[str, Any]) -> None:
    for name, recipe in results["recipe"]["metrics"].items():
        if any(name in row["metrics"] for row in results["models"].values()):
            assert f"<code>{recipe['id']}</code>" in text
    assert "n = 3, seeds 0 to 2." in text and "min_overlap 0.7" in text


def test_recipes_are_those_of_the_files_that_measured(
    finished_run: RunFolder, results: dict[str, Any]
) -> None:
    results = json.loads(json.dumps(results))
    recipe = results["recipe"]["metrics"]["prompt_accuracy"]
    recipe["id"], recipe["parameters"] = "12345678", {"file_sha256": "ab" * 32}
    shown = render_page(finished_run, results)
    assert "<code>12345678</code>" in shown and "file_sha256 abababababab…" in shown


def test_what_was_not_measured_is_listed(text: str, results: dict[str, Any]) -> None:
    assert results["skipped"] and f"Not measured: {len(results['skipped'])} numbers" in text
    assert all(f"<code>{name}</code>" in text for name in results["skipped"])


def test_published_scores_are_kept_apart(text: str, results: dict[str, Any]) -> None:
    assert "Published elsewhere: not the same protocol" in text
    assert "Published elsewhere: not the same protocol" in markdown(results)
    assert text.count("second-hand") >= 6 and any(entry.conflict for entry in PUBLISHED)
    assert all(entry.model and entry.protocol and entry.score and entry.source for entry in PUBLISHED)


def test_differences_show_their_intervals(text: str) -> None:
    assert re.search(r"<b>\+67 points</b> <small>[+-]?\d+ to \+100 points; 3 prompts are too few", text)


def test_three_models_name_their_pairs(finished_run: RunFolder, results: dict[str, Any]) -> None:
    results = json.loads(json.dumps(results))
    results["models"]["third"] = results["models"]["poor"]
    results["differences"] += [{**entry, "b": "third"} for entry in results["differences"]]
    shown = render_page(finished_run, results)
    assert "<small>good − poor</small>" in shown and "<small>good − third</small>" in shown


# ---- plots


def metric_values(value: float) -> dict[str, float]:
    return {"value": value, "low": value * 0.9, "high": value * 1.1}


def test_findings_of_several_pairs_name_them() -> None:
    def entry(a: str, b: str, value: float, verdict: str) -> dict[str, Any]:
        return {"a": a, "b": b, "metric": "prompt_accuracy", "value": value, "verdict": verdict}

    differences = [
        entry("x", "y", -0.2, "y is better"),
        entry("x", "z", 0.5, "x is better"),
        entry("y", "z", 0.01, "no difference shown with 64 prompts"),
        {"a": "y", "b": "w", "metric": "prompt_accuracy", "refused": "the windows differ"},
    ]
    models = {name: {"metrics": {"prompt_accuracy": metric_values(0.5)}} for name in "xyz"}
    assert wording.headline({"models": models, "differences": differences}) == [
        "All that the prompt asks for is shown by x in 50 %, by y in 50 % and by z in 50 % of prompts.",
        "x is ahead of z by 50 points.",
        "y is ahead of x by 20 points.",
        "No difference is shown between y and z.",
    ]
    assert wording.called(differences) == "2 of 4 pairs differ, 1 refused"


def test_quality_against_cost_takes_the_metrics_that_all_have() -> None:
    both = {"seconds_per_video": metric_values(2.0), "frechet/fixed": metric_values(0.5)}
    models = {
        "a": {"metrics": {**both, "prompt_accuracy": metric_values(0.5)}, "stages": {}},
        "b": {"metrics": both, "stages": {}},
    }
    drawn = quality_and_cost(models)
    assert len(drawn) == 1 and "Fréchet distance" in drawn[0]
    assert quality_and_cost({"a": {"metrics": {}, "stages": {}}}) == []
    assert len(quality_and_cost({"a": models["a"]})) == 2


def test_memory_curves_name_the_highest_stage() -> None:
    stages = {
        "text": {"seconds": 0.1, "peak_bytes": 2**20},
        "model/denoise": {"seconds": 1.0, "peak_bytes": 3 * 2**30},
    }
    drawn = memory_curves({"a": {"stages": stages}})
    assert "denoise 3.0 GiB" in drawn and "peak memory, GiB" in drawn
    assert memory_curves({"a": {"stages": {"text": {"seconds": 1.0, "peak_bytes": 0}}}}) == ""


# ---- the size of the page


def test_the_roofline_has_a_point_for_each_stage_that_was_measured_and_modelled(
    results: dict[str, Any],
) -> None:
    cost = {"flops": 2e9, "bytes_moved": 1e8}
    stages = {"model": {"seconds": 0.1}, "decode": {"seconds": 0.2}}
    models = {"a": {"stages": stages, "cost_model": {"model": cost, "text": cost, "decode": cost}}}
    drawn = roofline(models)
    assert drawn.count(">model<") == drawn.count(">decode<") == 1 and ">text<" not in drawn
    assert all(f">{name}<" in drawn for name in ("CPU core", "H200", "RTX4090"))
    assert roofline(results["models"]) == ""  # fakes have no cost model


def test_large_videos_are_made_small() -> None:
    video = Video(frames=torch.randint(0, 255, (6, 300, 900, 3), dtype=torch.uint8), fps=8.0)
    assert media.reduced(video.frames, 480).shape == (6, 160, 480, 3)
    assert media.strip(video).shape == (53, 6 * 160 + 5 * 8, 4)
    assert media.poster(video).shape == (160, 480, 3)
    large = torch.zeros(500, 500, 3, dtype=torch.uint8)
    assert media.picture(large).startswith("data:image/webp")


def test_the_page_stops_where_it_has_no_more_room(
    reported: RunFolder, suite: Suite, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = results["models"]
    assert [len(rows) for rows in prompt_rows(reported, suite, models)] == [3, 0]
    monkeypatch.setattr(page, "MAX_PROMPTS", 1)
    films, strips = prompt_rows(reported, suite, models)
    assert [len(films), len(strips)] == [1, 2]
    assert "film" in films[0]["cells"]["good"] and "film" not in strips[0]["cells"]["good"]
    assert "Contact sheet: 2 more prompts" in render_page(reported, results)
    assert len(render_page(reported, results, room=0)) < len(render_page(reported, results))
    monkeypatch.setattr(page, "MAX_BYTES", 1000)
    assert [len(rows) for rows in prompt_rows(reported, suite, models)] == [1, 0]


def test_the_report_is_small(text: str) -> None:
    assert len(text) < 1_500_000


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (wording.operations(42), "42 FLOP"),
        (wording.operations(3.2e9), "3.2 GFLOP"),
        (wording.operations(664e12), "664 TFLOP"),
        (wording.operations(33.2e15), "33,200 TFLOP"),
        (wording.seconds(0.00025), "250 µs"),
        (wording.counted(1, "prompts"), "1 prompt"),
        (wording.counted(1600, "tokens"), "1,600 tokens"),
        (wording.seeds(replace(Suite(name="x", models=("a",)), num_prompts=1, seed=7)), "seed 7"),
    ],
)
def test_costs_in_words(words: str, shown: str) -> None:
    assert words == shown
