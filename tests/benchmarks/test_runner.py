"""Runs resume, change nothing when there is nothing to do, and make again what changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.engines import run_with
from benchmarks.runner import plain_settings, run_suite
from benchmarks.storage import RunFolder, load_frames, read_json
from benchmarks.suites import Suite, items
from shared.errors import SettingError
from shared.files import write_json
from tests.benchmarks.conftest import Models
from tests.benchmarks.fakes import FakeGenerator

Build = Callable[[str], FakeGenerator]


def contents(folder: RunFolder) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_run_keeps_frames_films_and_sidecars(suite: Suite, finished_run: RunFolder, models: Models) -> None:
    item = items(suite)[1]
    sidecar = read_json(finished_run.videos("good") / f"{item.id}.json")
    assert (finished_run.videos("good") / f"{item.id}.mp4").stat().st_size > 0
    assert sidecar["prompt"] == item.prompt and sidecar["seed"] == item.seed == 1
    assert sidecar["settings"] == models["good"].settings()
    assert sidecar["stages"]["model"]["units"] == 4
    from shared.protocol import GenerationRequest

    again = models["good"].generate(GenerationRequest(prompt=item.prompt, seed=item.seed)).video
    assert torch.equal(load_frames(finished_run.videos("good"), sidecar).frames, again.frames)
    assert len(list(finished_run.reconstructions("poor").glob("*.mkv"))) == suite.num_clips


def test_every_model_gets_the_same_prompts_and_seeds(suite: Suite, finished_run: RunFolder) -> None:
    for item in items(suite):
        pair = [read_json(finished_run.videos(model) / f"{item.id}.json") for model in ("good", "poor")]
        assert [(sidecar["prompt"], sidecar["seed"]) for sidecar in pair] == [(item.prompt, item.seed)] * 2


def test_a_second_run_does_nothing_and_says_so(
    suite: Suite, finished_run: RunFolder, models: Models, build: Build
) -> None:
    before = contents(finished_run)
    outcome = run_suite(suite, finished_run, build=build, quiet=True)
    assert outcome.summary == "nothing to do: all 10 items are finished with these settings"
    assert contents(finished_run) == before
    assert models["good"].calls == []


def test_an_interrupted_run_goes_on_where_it_stopped(
    suite: Suite, folder: RunFolder, models: Models, build: Build
) -> None:
    def stop(request: object) -> None:
        raise KeyboardInterrupt

    whole = models["poor"].generate
    models["poor"].generate = stop  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, folder, build=build, quiet=True)
    models["poor"].generate = whole  # type: ignore[method-assign]
    outcome = run_suite(suite, folder, build=build, quiet=True)
    assert (outcome.made, outcome.kept) == (5, 5)
    assert models["good"].calls == models["poor"].calls == [0, 1, 2]


def test_an_item_without_its_frames_is_made_again(
    suite: Suite, finished_run: RunFolder, build: Build
) -> None:
    next(finished_run.videos("good").glob("*.mkv")).unlink()
    assert run_suite(suite, finished_run, build=build, quiet=True).made == 1


def test_changed_settings_make_only_that_model_again(
    suite: Suite, finished_run: RunFolder, models: Models, build: Build
) -> None:
    models["poor"].steps = 8
    outcome = run_suite(suite, finished_run, build=build, quiet=True)
    assert (outcome.made, outcome.kept, outcome.remade) == (5, 5, 5)
    assert "5 of them again" in outcome.summary
    assert models["good"].calls == []


def test_more_prompts_keep_the_first(
    suite: Suite, finished_run: RunFolder, models: Models, build: Build
) -> None:
    run_suite(replace(suite, num_prompts=5), finished_run, build=build, quiet=True)
    assert models["good"].calls == [3, 4]


def test_a_failing_item_is_listed_and_made_next_time(
    suite: Suite, folder: RunFolder, models: Models, build: Build
) -> None:
    models["good"].fail_on = (1,)
    outcome = run_suite(suite, folder, build=build, quiet=True)
    item = items(suite)[1]
    assert outcome.failed == {f"good/{item.id}": "RuntimeError: the model fell over"}
    assert read_json(folder.index)["failed"] == outcome.failed
    models["good"].fail_on = ()
    assert run_suite(suite, folder, build=build, quiet=True).made == 1
    assert read_json(folder.index)["failed"] == {}


def test_warm_up_is_neither_kept_nor_counted(
    suite: Suite, folder: RunFolder, models: Models, build: Build
) -> None:
    outcome = run_suite(replace(suite, warm_up=True), folder, build=build, quiet=True)
    assert models["good"].calls == [0, 0, 1, 2]
    assert outcome.made == 10
    run_suite(replace(suite, warm_up=True), folder, build=build, quiet=True)
    assert models["good"].calls == [0, 0, 1, 2]  # nothing pending, nothing to warm up for


def test_several_videos_of_a_prompt_have_seeds_of_their_own(suite: Suite) -> None:
    made = items(replace(suite, num_prompts=2, num_videos_per_prompt=3, seed=10))
    assert [item.seed for item in made] == list(range(10, 16))
    assert len({item.id for item in made}) == 6
    assert [item.prompt_index for item in made] == [0, 0, 0, 1, 1, 1]


def test_torchrun_must_have_started_the_process(
    suite: Suite, folder: RunFolder, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SettingError, match="torchrun --nproc_per_node"):
        run_with("torchrun", suite, folder, build=build)
    with pytest.raises(SettingError, match="'torchrun'"):
        run_with("torchrum", suite, folder, build=build)


def test_frames_that_changed_on_disk_are_noticed(suite: Suite, finished_run: RunFolder) -> None:
    folder, names = finished_run.videos("good"), [item.id for item in items(suite)]
    (folder / f"{names[0]}.mkv").write_bytes((folder / f"{names[1]}.mkv").read_bytes())
    with pytest.raises(SettingError, match="does not hold the frames"):
        load_frames(folder, read_json(folder / f"{names[0]}.json"))


def test_a_run_of_another_format_is_refused(suite: Suite, folder: RunFolder, build: Build) -> None:
    write_json(folder.index, {"format": 99})
    with pytest.raises(SettingError, match="another version"):
        run_suite(suite, folder, build=build, quiet=True)


def test_settings_must_be_plain() -> None:
    assert plain_settings({"a": (1, 2.5), "b": {"c": None}}) == {"a": [1, 2.5], "b": {"c": None}}
    with pytest.raises(TypeError, match="JSON values, got dtype"):
        plain_settings({"dtype": np.dtype("float32")} | {"dtype": torch.float32})
