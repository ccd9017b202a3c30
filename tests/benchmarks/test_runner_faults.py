"""Runs that are killed and runs whose videos are damaged."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import registry
from benchmarks.__main__ import main
from benchmarks.evaluation import evaluate
from benchmarks.metrics import prompt_accuracy
from benchmarks.report import REPORTS, up_to_date, write_reports
from benchmarks.runner import run_suite
from benchmarks.storage import RunFolder, lasting, load_frames, read_json
from benchmarks.suites import Suite, items
from shared.clips import shapes
from shared.protocol import GenerationRequest
from shared.video_io import write_video
from tests.benchmarks.conftest import Models, make_models
from tests.benchmarks.fakes import FakeGenerator

Build = Callable[[str], FakeGenerator]
KILLS = 10


def run_and_report(suite: Suite, folder: RunFolder) -> str:
    outcome = run_suite(suite, folder, build=make_models().__getitem__, quiet=True)
    if outcome.made or not up_to_date(folder):
        write_reports(folder)
    return outcome.summary


def killed_run(suite: Suite, folder: RunFolder, breath: int) -> bool:
    """Run in a process that is killed at its `breath`-th flush to disk; did it end by itself?"""
    child = os.fork()
    if child == 0:
        flush, left = os.fsync, [breath]

        def fsync(descriptor: int) -> None:
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(descriptor)

        os.fsync = fsync
        try:
            run_and_report(suite, folder)
        finally:
            os._exit(0)
    return not os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_random_points_and_run_again_the_results_are_the_same(
    suite: Suite, reported: RunFolder, folder: RunFolder
) -> None:
    rng = random.Random(time.time_ns())
    for _ in range(KILLS):
        if killed_run(suite, folder, breath := rng.randint(1, 40)):
            print(f"it had ended before flush {breath}")
    run_and_report(suite, folder)
    whole, stopped = (json.dumps(lasting(read_json(f.path / "results.json"))) for f in (reported, folder))
    assert stopped == whole
    for path in reported.path.glob("*/**/*.mkv"):
        assert (folder.path / path.relative_to(reported.path)).read_bytes() == path.read_bytes()
    assert not (folder.path / "claims").exists() and not (folder.path / "workers").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.is_file()}
    assert "nothing to do" in run_and_report(suite, folder)
    left = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.is_file()}
    assert left == before and not [path for path in before if ".tmp" in path.name]


def test_a_run_killed_before_its_report_writes_it_later(
    suite: Suite, folder: RunFolder, models: Models, build: Build
) -> None:
    models["good"].fail_on = (1,)
    run_suite(suite, folder, build=build, quiet=True)
    write_reports(folder)
    models["good"].fail_on = ()
    run_suite(suite, folder, build=build, quiet=True)  # and killed here, with reports of the run before
    assert run_suite(suite, folder, build=build, quiet=True).made == 0
    assert not up_to_date(folder)


@pytest.mark.parametrize("during", REPORTS[:3])
def test_a_run_killed_while_its_report_is_written_writes_it_later(
    during: str, suite: Suite, finished_run: RunFolder, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_suite(replace(suite, num_prompts=2), finished_run, build=build, quiet=True)
    replaced = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == during:
            raise KeyboardInterrupt
        replaced(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_reports(finished_run)
    assert not up_to_date(finished_run)
    write_reports(finished_run)
    assert up_to_date(finished_run)


def test_damaged_frames_are_listed_and_made_again(
    suite: Suite, finished_run: RunFolder, models: Models, build: Build
) -> None:
    names = [item.id for item in items(suite)]
    frames = finished_run.videos("good") / f"{names[0]}.mkv"
    content = bytearray(frames.read_bytes())
    content[len(content) // 2] ^= 0xFF
    frames.write_bytes(content)  # of the same size, so that only looking at the frames can tell
    clip = finished_run.reconstructions("poor") / "001.mkv"
    clip.write_bytes(b"not a video")
    results = write_reports(finished_run)
    assert set(results["failed"]) == {f"good/{names[0]}", "poor/codec/001"}
    assert read_json(finished_run.index)["failed"] == results["failed"]
    assert results["models"]["good"]["num_videos"] == 2
    assert main(["report", str(finished_run.path)]) == 7
    outcome = run_suite(suite, finished_run, build=build, quiet=True)
    assert (outcome.made, outcome.failed, models["good"].calls) == (2, {}, [0])
    assert load_frames(finished_run.videos("good"), read_json(frames.with_suffix(".json")))
    assert evaluate(finished_run)["failed"] == {} and read_json(finished_run.index)["failed"] == {}


@pytest.mark.slow
def test_a_thousand_items_of_which_twenty_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 7, every damaged item listed, and all other numbers as they would be without them."""
    folder, count = tmp_path / "videos", 1000
    folder.mkdir()
    distinct = list(dict.fromkeys(caption.text for caption in shapes.prompts("train", count, 0)))[:100]
    prompts = distinct * (count // len(distinct))
    damaged = sorted(random.Random(0).sample(range(count), count // 50))
    model = FakeGenerator("m", wrong_from=count // 3, num_frames=5)
    right: dict[str, list[float]] = {}
    monkeypatch.setattr("benchmarks.report.render_page", lambda *given, **named: "")  # a thousand films
    monkeypatch.setattr("benchmarks.evaluation.MIN_VIDEOS", count)  # no distances: there is no true clip
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    rows = []
    for index, prompt in enumerate(prompts):
        video = model.generate(GenerationRequest(prompt=prompt, seed=index)).video
        path = folder / f"{index:04d}.mkv"
        if index in damaged:
            spoil(path, index)
        else:
            write_video(video, path)
            right.setdefault(prompt, []).append(prompt_accuracy.measure(video, prompt)["prompt_accuracy"])
        rows.append({"file": path.name, "prompt": prompt})
    (folder / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")
    assert main(["import_videos", str(folder), "--output_path", str(tmp_path / "run"), "--quiet"]) == 7
    said = capsys.readouterr()
    results = read_json(tmp_path / "run" / "results.json")
    assert len(results["failed"]) == len(damaged) and f"{len(damaged)} items failed" in said.err
    name = f"external:{folder}"
    accuracy = results["models"][name]["metrics"]["prompt_accuracy"]
    assert results["models"][name]["num_videos"] == count - len(damaged)
    assert accuracy["value"] == pytest.approx(by_prompt_mean(right)) and accuracy["n"] == len(distinct)
    assert all(item in said.out for item in results["failed"])


def by_prompt_mean(values: dict[str, list[float]]) -> float:
    means = [sum(some) / len(some) for some in values.values()]
    return sum(means) / len(means)


def spoil(path: Path, index: int) -> None:
    """Empty, no video, cut short, in turn."""
    if index % 3 == 2:
        caption = shapes.prompts("train", 1, 0)[0]
        video = FakeGenerator("m").generate(GenerationRequest(prompt=caption.text)).video
        whole = write_video(video, path).read_bytes()
        path.write_bytes(whole[: len(whole) * (1 + index % 5) // 8])  # up to half of its frames can be read
        return
    path.write_bytes(b"" if index % 3 else b"this is no video at all")


def test_the_registry_knows_both_kinds_of_other_models(tmp_path: Path) -> None:
    assert registry.resolve(f"diffusers:{tmp_path}").family == "diffusers"
    assert registry.resolve(f"external:{tmp_path}").source == str(tmp_path)
