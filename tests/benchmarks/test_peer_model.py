"""Models in one run turn by turn, and diffusers' pipeline behind the benchmark's protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import registry
from benchmarks.peers.generator import DiffusersVideos
from benchmarks.runner import by_turns, run_suite
from benchmarks.storage import RunFolder, read_json
from benchmarks.suites import Suite, items
from benchmarks.work import Task
from shared.protocol import VideoGenerator
from tests.benchmarks.conftest import Models


def test_models_take_turns_and_none_is_always_first() -> None:
    tasks = [[Task(name=f"{m}{i}", done=bool, make=print) for i in range(3)] for m in "ab"]
    assert [task.name for task in by_turns(tasks)] == ["a0", "b0", "b1", "a1", "a2", "b2"]


def test_interleaved_models_are_in_memory_together(suite: Suite, folder: RunFolder, models: Models) -> None:
    made: list[str] = []
    for name, model in models.items():
        made_by = model.generate

        def noting(request, name=name, made_by=made_by):  # type: ignore[no-untyped-def]
            made.append(f"{name} {request.seed}")
            return made_by(request)

        model.generate = noting  # type: ignore[method-assign]
    interleaved = Suite(name="demo", models=suite.models, num_prompts=3, num_clips=0, interleave=True)
    run_suite(interleaved, folder, build=models.__getitem__, quiet=True)
    assert made == ["good 0", "poor 0", "poor 1", "good 1", "good 2", "poor 2"]


@pytest.mark.peers
def test_diffusers_makes_videos_with_the_settings_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    ours = registry.build("cogvideox-demo")
    weights = tmp_path / "weights"
    ours.save_pretrained(weights, format="diffusers")  # type: ignore[attr-defined]
    name = f"diffusers:{weights}"
    suite = Suite(name="peers", models=(name,), num_prompts=1, num_clips=0)

    def build(name: str) -> VideoGenerator:
        model = registry.build(name)
        assert isinstance(model, DiffusersVideos)
        given, wanted = model.settings(), ours.settings()  # type: ignore[attr-defined]
        for setting in (
            "num_frames",
            "height",
            "width",
            "fps",
            "num_inference_steps",
            "guidance_scale",
            "dtype",
        ):
            assert given[setting] == wanted[setting], setting
        model.call = replace(model.call, num_inference_steps=2)
        return model

    folder = RunFolder(path=tmp_path / "run")
    outcome = run_suite(suite, folder, build=build, quiet=True)
    assert outcome.made == 1 and not outcome.failed, outcome.failed
    sidecar = read_json(folder.videos(name) / f"{items(suite)[0].id}.json")
    size = {"frames": "num_frames", "fps": "fps", "height": "height", "width": "width"}
    assert sidecar["video"] == {key: ours.settings()[value] for key, value in size.items()}
    assert [*sidecar["stages"]] == ["text", "model", "decode"]
    assert sidecar["stages"]["model"]["units"] == 2
