"""What a run says about itself: results.json's form, and a page that needs nothing but itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import media, wording
from benchmarks.comparison import compare
from benchmarks.evaluation import evaluate
from benchmarks.metrics import METRICS
from benchmarks.report import up_to_date, write_reports, write_results
from benchmarks.runner import run_suite
from benchmarks.storage import RunFolder
from benchmarks.suites import Suite
from shared.errors import SettingError
from shared.video import Video
from tests.benchmarks.conftest import Models
from tests.benchmarks.fakes import FakeGenerator

Build = Callable[[str], FakeGenerator]
VOID = {"meta", "link", "input", "img", "br", "use", "path"}


class Page(HTMLParser):
    """Tags with their attributes, and the order in which they close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def results_of(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.path / "results.json").read_text(encoding="utf-8"))


def test_results_have_their_form(reported: RunFolder) -> None:
    results = results_of(reported)
    assert results.keys() >= {"recipe", "models"}
    assert results["recipe"]["command"].startswith("cogvideo-bench run demo --models good poor")
    for row in results["models"].values():
        for name, value in row["metrics"].items():
            assert value.keys() == {"value", "low", "high", "n", "recipe"}
            assert value["low"] <= value["value"] <= value["high"] and value["n"] >= 1
            assert value["recipe"].startswith(results["recipe"]["metrics"][name]["id"])
        assert row["stages"]["model"].keys() >= {"seconds", "peak_bytes"}
        assert {"prompt_accuracy", "prompt_accuracy/colour", "reconstruction/psnr"} <= row["metrics"].keys()


def test_numbers_are_those_of_the_fakes(reported: RunFolder) -> None:
    models = results_of(reported)["models"]
    assert models["good"]["metrics"]["prompt_accuracy"]["value"] == 1.0
    assert models["good"]["metrics"]["reconstruction/psnr"]["value"] == 60.0
    assert models["poor"]["metrics"]["prompt_accuracy"]["value"] == pytest.approx(1 / 3)
    assert models["poor"]["metrics"]["prompt_accuracy/colour"]["value"] == pytest.approx(1 / 3)
    assert models["poor"]["metrics"]["prompt_accuracy/shape"]["value"] == 1.0
    assert models["poor"]["stages"]["model"]["units_per_second"] == pytest.approx(20.0)
    truth = results_of(reported)["references"]["ground truth"]["metrics"]
    assert truth["prompt_accuracy"]["value"] == 1.0


def test_measuring_again_gives_the_same_reports(finished_run: RunFolder, reported: RunFolder) -> None:
    write_reports(finished_run, {"good": "draws what is asked"})
    for name in ("results.json", "per_item.json", "sets.json", "report.md", "report.tex", "report.html"):
        assert (finished_run.path / name).read_bytes() == (reported.path / name).read_bytes()


def test_the_page_asks_the_network_for_nothing(reported: RunFolder) -> None:
    text = (reported.path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|@import|url\((?!#)", text)
    page = Page(text)
    sources = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "poster", "srcset", "xlink:href")
    ]
    local = {"results.json", "per_item.json", "report.md", "report.tex"}
    assert all(s and (s.startswith(("data:", "#")) or s in local) for s in sources)
    assert all((reported.path / name).is_file() for name in local)


def test_the_page_is_whole_and_readable_by_all(reported: RunFolder) -> None:
    page = Page((reported.path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert len(page.all("video")) == 3 * 3  # two models and the ground truth
    assert all(v["aria-label"] and str(v["src"]).startswith("data:video/mp4") for v in page.all("video"))
    assert all(image.get("alt") for image in page.all("img"))
    ids = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert page.all("html")[0]["lang"] == "en"
    assert any(m.get("name") == "viewport" for m in page.all("meta"))
    assert len(page.all("svg")) == 4


def test_every_number_opens_its_recipe(reported: RunFolder) -> None:
    text = (reported.path / "report.html").read_text(encoding="utf-8")
    for row in results_of(reported)["models"].values():
        for name in row["metrics"]:
            assert METRICS[name].recipe_id in text


def test_prompts_are_escaped(suite: Suite, folder: RunFolder, build: Build) -> None:
    nasty = replace(
        suite, prompts=("a red circle <script>alert(1)</script> & moving left slowly",), num_prompts=1
    )
    run_suite(nasty, folder, build=build, quiet=True)
    write_reports(folder)
    text = (folder.path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_markdown_has_the_numbers(reported: RunFolder) -> None:
    text = (reported.path / "report.md").read_text(encoding="utf-8")
    assert "| Prompt accuracy ↑ | 100 % (" in text and "| poor | model/late | 0.10 s |" in text
    assert "3 prompts are too few to tell" in text


def test_prompts_of_another_world_are_refused_not_scored(
    suite: Suite, folder: RunFolder, build: Build
) -> None:
    run_suite(
        replace(suite, prompts=("a red car on a road",), num_prompts=1), folder, build=build, quiet=True
    )
    results = evaluate(folder)
    assert "prompt_accuracy" not in results["models"]["good"]["metrics"]
    assert "names none of the oracle's shapes" in results["models"]["good"]["refused"]["prompt_accuracy"]
    assert "temporal_consistency" in results["models"]["good"]["metrics"]
    assert any("prompt_accuracy refused" in note for note in results["notes"])
    write_reports(folder)


def test_unlike_videos_are_not_compared_frame_by_frame(
    suite: Suite, folder: RunFolder, models: Models, build: Build
) -> None:
    models["poor"].fps = 16.0
    run_suite(suite, folder, build=build, quiet=True)
    results = evaluate(folder)
    entries = {entry["metric"]: entry for entry in results["differences"]}
    assert "64x64 at 8 fps against 64x64 at 16 fps" in entries["temporal_consistency"]["refused"]
    assert "value" in entries["seconds_per_video"]
    assert any("differ in length, rate or size" in note for note in results["notes"])


def test_a_model_without_codec_says_so(suite: Suite, folder: RunFolder, models: Models, build: Build) -> None:
    models["poor"].kernel = None
    run_suite(suite, folder, build=build, quiet=True)
    results = evaluate(folder)
    assert "no codec" in results["models"]["poor"]["refused"]["reconstruction"]
    assert "reconstruction/psnr" in results["models"]["good"]["metrics"]


def test_a_run_in_which_everything_failed_still_reports(
    suite: Suite, folder: RunFolder, models: Models, build: Build
) -> None:
    for model in models.values():
        model.fail_on = (0, 1, 2)
    run_suite(suite, folder, build=build, quiet=True)
    results = write_reports(folder)
    assert results["models"]["good"]["num_videos"] == 0
    assert "the model fell over" in (folder.path / "report.html").read_text(encoding="utf-8")


def test_reports_know_whether_they_are_up_to_date(
    finished_run: RunFolder, suite: Suite, build: Build
) -> None:
    assert up_to_date(finished_run)
    run_suite(replace(suite, num_prompts=2), finished_run, build=build, quiet=True)
    assert not up_to_date(finished_run)


def test_compare_finds_what_changed(suite: Suite, tmp_path: Path, models: Models, build: Build) -> None:
    suite = replace(suite, num_prompts=8, num_clips=0, models=("poor",))
    before, after = RunFolder(path=tmp_path / "before"), RunFolder(path=tmp_path / "after")
    for folder, wrong_from in ((before, 1), (after, 1000)):
        models["poor"].wrong_from = wrong_from
        run_suite(suite, folder, build=build, quiet=True)
        write_results(folder, evaluate(folder))
    found = {entry["metric"]: entry for entry in compare(after, before)}
    colour = found["prompt_accuracy/colour"]
    assert colour["value"] == pytest.approx(7 / 8) and colour["verdict"] == "poor (first) is better"
    assert found["prompt_accuracy/shape"]["value"] == 0.0


def test_compare_refuses_what_shares_nothing(
    suite: Suite, reported: RunFolder, tmp_path: Path, build: Build
) -> None:
    other = RunFolder(path=tmp_path / "other")
    run_suite(replace(suite, seed=5), other, build=build, quiet=True)
    write_results(other, evaluate(other))
    with pytest.raises(SettingError, match="share no prompt"):
        compare(reported, other)
    with pytest.raises(SettingError, match=r"no results\.json"):
        compare(reported, RunFolder(path=tmp_path / "nothing"))


def test_compare_refuses_other_recipes(reported: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(path=tmp_path / "other")
    other.path.mkdir()
    results = results_of(reported)
    results["recipe"]["metrics"]["prompt_accuracy"]["id"] = "00000000"
    (other.path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (other.path / "per_item.json").write_bytes((reported.path / "per_item.json").read_bytes())
    entry = next(e for e in compare(reported, other) if e["metric"] == "prompt_accuracy")
    assert "two recipes" in entry["refused"]


def test_films_have_every_frame_and_even_sides() -> None:
    import base64
    import io

    import av

    video = Video(frames=torch.randint(0, 255, (5, 21, 33, 3), dtype=torch.uint8), fps=8.0)
    address = media.film(video)
    content = base64.b64decode(address.removeprefix("data:video/mp4;base64,"))
    with av.open(io.BytesIO(content)) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 5 and frames[0].width == 33 * 7 - 1 and frames[0].height == 21 * 7 - 1
    assert media.strip(video).shape == (21, 5 * 33 + 4, 4)


@pytest.mark.parametrize(
    ("name", "value", "sign", "words"),
    [
        ("prompt_accuracy", 0.754, False, "75 %"),
        ("prompt_accuracy", -0.25, True, "-25 points"),
        ("reconstruction/psnr", 31.234, False, "31.2 dB"),
        ("temporal_consistency", -0.00001, True, "0.0000"),
        ("seconds_per_video", 0.456, False, "0.46 s"),
    ],
)
def test_numbers_in_words(name: str, value: float, sign: bool, words: str) -> None:
    assert wording.number(METRICS[name], value, sign=sign) == words


def test_sizes_and_durations_in_words() -> None:
    assert [wording.seconds(s) for s in (0.0042, 0.085, 0.42, 12, 200)] == [
        "4.2 ms",
        "85 ms",
        "0.42 s",
        "12 s",
        "3.33 min",
    ]
    assert [wording.size(b) for b in (512, 2048, 50 * 2**20, 3 * 2**31)] == [
        "512 B",
        "2.0 KiB",
        "50 MiB",
        "6.0 GiB",
    ]
