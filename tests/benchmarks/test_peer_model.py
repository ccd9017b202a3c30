"""Models in one run turn by turn, and diffusers' pipeline behind the benchmark's protocol."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import registry
from benchmarks.peers.generator import DiffusersVideos
from benchmarks.report import write_reports
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


@pytest.fixture(scope="module")
def random_weights(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline folder of tiny random nets, made and written by diffusers alone."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vocabulary = root / "cogvideox_diff" / "demo" / "tokenizer"
    words = transformers.T5TokenizerFast.from_pretrained(vocabulary)
    kinds = {"encoder": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    text = transformers.T5Config(
        vocab_size=128, d_model=kinds.pop("encoder"), feed_forward_proj="gated-gelu", **kinds
    )
    net = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=32, num_layers=2, sample_width=4, sample_height=4, sample_frames=9,
        max_text_seq_length=16, patch_size=2, temporal_compression_ratio=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        sample_height=32, sample_width=32, temporal_compression_ratio=4,
    )  # fmt: skip
    schedule = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )  # as the released models have it
    pipe = diffusers.CogVideoXPipeline(words, transformers.T5EncoderModel(text), vae, net, schedule)
    folder = tmp_path_factory.mktemp("peers") / "random"
    pipe.save_pretrained(folder)
    shutil.copy(vocabulary / "spiece.model", folder / "tokenizer")  # as in the released folders
    return folder


@pytest.mark.peers
def test_ours_and_diffusers_take_turns_on_one_folder(random_weights: Path, folder: RunFolder) -> None:
    """Both pipelines in one run on the same random weights: in turn, each measured, side by side."""
    names = (f"cogvideox:{random_weights}", f"diffusers:{random_weights}")
    suite = Suite(name="turns", models=names, num_prompts=2, num_clips=0, interleave=True)
    made: list[str] = []

    def build(name: str) -> VideoGenerator:
        model = registry.build(name)
        generate = model.generate

        def noting(request):  # type: ignore[no-untyped-def]
            made.append(f"{name.partition(':')[0]} {request.seed}")
            return generate(request)

        model.generate = noting  # type: ignore[method-assign]
        return model

    outcome = run_suite(suite, folder, build=build, quiet=True)
    assert outcome.made == 4 and not outcome.failed, outcome.failed
    assert made == ["cogvideox 0", "diffusers 0", "diffusers 1", "cogvideox 1"]
    results = write_reports(folder)
    ours, theirs = (results["models"][name] for name in names)
    assert ours["video"] == theirs["video"] and ours["video"]["frames"] == 9
    assert [*ours["stages"]] == [*theirs["stages"]] == ["text", "model", "decode"]
    assert ours["stages"]["model"]["units"] == theirs["stages"]["model"]["units"]
    seconds = next(e for e in results["differences"] if e["metric"] == "seconds_per_video")
    assert (seconds["a"], seconds["b"], seconds["n"]) == (*names, 2)
    page = (folder.path / "report.html").read_text(encoding="utf-8")
    assert page.count("diffusers:") > 3 and "Stages of one video, measured" in page


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
