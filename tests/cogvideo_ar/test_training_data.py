"""Training samples of the autoregressive model, and a tiny recipe run through all its stages."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogvideo_ar.config import VQVAEConfig, cogvideo_demo
from cogvideo_ar.training import data, recipes
from cogvideo_ar.training.data import TokenClips, duration_text, lowest_rate
from cogvideo_ar.training.export import export
from cogvideo_ar.vqvae import VQVAE
from shared import training
from shared.clips import shapes
from shared.errors import SettingError, WeightsError
from shared.training import Interrupted, TrainConfig
from tests.shared.clip_files import world

# ---- samples


def numbered_clips(num: int = 6, num_frames: int = 17) -> TokenClips:
    """Every token of frame t of clip n is 100 n + t, so a sample tells where it was cut."""
    places = 100 * torch.arange(num)[:, None, None] + torch.arange(num_frames)[:, None]
    return TokenClips(tokens=places.expand(-1, -1, 4), captions=tuple(shapes.captions()[:num]))


@pytest.mark.parametrize(
    ("num_frames", "stride"), [(5, 1), (8, 1), (9, 2), (16, 2), (17, 4), (18, 4), (400, 4)]
)
def test_the_lowest_fitting_rate(num_frames: int, stride: int) -> None:
    assert lowest_rate(num_frames, 5) == stride
    assert lowest_rate(num_frames, 5, strides=(1, 4, 2)) == stride


def test_a_clip_that_no_rate_fits() -> None:
    with pytest.raises(ValueError, match="4 frames is too short for 5"):
        lowest_rate(4, 5)


@pytest.mark.parametrize(("stride", "text"), [(4, "2.0"), (2, "1.0"), (1, "0.5")])
def test_duration_text_is_what_inference_writes(stride: int, text: str) -> None:
    sampling = cogvideo_demo().sampling
    assert duration_text(stride, 5, shapes.FPS) == text
    assert float(text) in (sampling.keyframe_duration, *sampling.interpolation_durations)


@pytest.mark.parametrize("sample_of", [data.keyframe_sample, data.interpolation_sample])
def test_samples_lie_inside_their_clip_at_even_distances(sample_of) -> None:
    clips, rng = numbered_clips(), np.random.default_rng(0)
    starts = set()
    for _ in range(200):
        sample = sample_of(clips, rng, 5)
        places = sample.frames[:, 0] % 100
        assert sample.frames.shape == (5, 4)
        assert (places.diff() == sample.stride).all()
        assert 0 <= places.min() and places.max() < 17
        assert sample.caption == clips.captions[int(sample.frames[0, 0]) // 100]
        starts.add((sample.stride, int(places[0])))
    assert {start for stride, start in starts if stride == 2} == set(range(9))
    assert {start for stride, start in starts if stride == 1} == set(range(13))


def test_key_frames_take_the_rate_of_the_drawn_length() -> None:
    rng, clips = np.random.default_rng(0), numbered_clips()
    strides = [data.keyframe_sample(clips, rng, 5).stride for _ in range(600)]
    for stride, share in ((4, 0.6), (2, 0.2), (1, 0.2)):
        assert abs(strides.count(stride) / 600 - share) < 0.06


def test_interpolation_trains_the_rates_of_its_rounds_only() -> None:
    rng = np.random.default_rng(0)
    strides = {data.interpolation_sample(numbered_clips(), rng, 5).stride for _ in range(50)}
    rounds = cogvideo_demo().sampling.interpolation_durations
    assert {float(duration_text(stride, 5, shapes.FPS)) for stride in strides} == set(rounds)


@pytest.mark.parametrize("sample_of", [data.keyframe_sample, data.interpolation_sample])
def test_samples_are_a_function_of_the_generator(sample_of) -> None:
    first, again, other = (
        sample_of(numbered_clips(), np.random.default_rng([1, step]), 5) for step in (4, 4, 5)
    )
    assert torch.equal(first.frames, again.frames) and first.stride == again.stride
    assert not torch.equal(first.frames, other.frames)


# ---- a recipe at work


def tiny_recipe() -> recipes.Recipe:
    """The demo with 32 image tokens, one layer and three steps a stage."""
    demo = cogvideo_demo()
    keyframes = replace(
        demo.keyframes,
        num_layers=1,
        num_heads=2,
        head_dim=8,
        num_image_tokens=32,
        vocab_size=128,
        start_of_image=108,
        pad_token=35,
    )
    vqvae = VQVAEConfig(
        base_channels=4,
        encoder_multipliers=(1, 1, 1),
        num_res_blocks=1,
        encoder_out_channels=8,
        codebook_size=32,
        code_dim=4,
        decoder_multipliers=((1, 1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1)),
        norm_groups=2,
        rates=(8,),
    )
    steps = TrainConfig(steps=3, warmup_steps=1, ema_decay=0.5, save_every=99, log_every=1, optimizer="muon")
    return recipes.Recipe(
        config=replace(
            demo,
            keyframes=keyframes,
            interpolation=replace(keyframes, temporal="window", window=4),
            vqvae=vqvae,
        ),
        vqvae=replace(steps, steps=4, ema_decay=0.0),
        base=steps,
        keyframes=steps,
        interpolation=steps,
        vqvae_batch=2,
        continuous_steps=2,
        image_batch=3,
        clip_batch=2,
        num_clips=5,
        num_stills=4,
    )


OUTPUTS = {
    "tokenizer": ["ice_text.model"],
    "vqvae": ["vqvae/weights.safetensors"],
    "tokens": ["tokens/clips.safetensors", "tokens/stills.safetensors"],
    "base": ["base/weights.safetensors"],
    "keyframes": ["keyframes/weights.safetensors"],
    "interpolation": ["interpolation/weights.safetensors"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has run to its end."""
    folder = tmp_path_factory.mktemp("ar")
    run = recipes.Run(tiny_recipe(), folder, quiet=True)
    for stage in recipes.STAGES:
        run.stage(stage)
    return folder


def earlier_stages(finished: Path, stage: str, folder: Path) -> Path:
    """A copy of `finished` that stops before `stage`."""
    for name in recipes.STAGES[: recipes.STAGES.index(stage)]:
        for output in OUTPUTS[name]:
            (folder / output).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(finished / output, folder / output)
    return folder


def stopped_train(*args, **options) -> Path:
    """The loop, asked to stop after its second step."""
    return training.train(
        *args, **options, after_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None
    )


def test_every_stage_is_tested() -> None:
    assert tuple(OUTPUTS) == recipes.STAGES


@pytest.mark.parametrize("stage", ["vqvae", "base", "keyframes", "interpolation"])
def test_an_interrupted_stage_resumes_exactly(
    stage: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipes.Run(tiny_recipe(), earlier_stages(finished, stage, tmp_path), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "train", stopped_train)
        with pytest.raises(Interrupted):
            run.stage(stage)
    (output,) = OUTPUTS[stage]
    assert not (tmp_path / output).exists()
    run.stage(stage)
    assert (tmp_path / output).read_bytes() == (finished / output).read_bytes()


def test_samples_that_are_drawn_on_the_way_change_nothing(finished: Path, tmp_path: Path) -> None:
    recipe = replace(tiny_recipe(), sample_prompt="a red circle")
    recipe = replace(recipe, keyframes=replace(recipe.keyframes, sample_every=2))
    run = recipes.Run(recipe, earlier_stages(finished, "keyframes", tmp_path), quiet=True)
    run.stage("keyframes")
    (output,) = OUTPUTS["keyframes"]
    assert (tmp_path / output).read_bytes() == (finished / output).read_bytes()
    drawn = sorted(path.name for path in (tmp_path / "keyframes" / "samples").iterdir())
    assert drawn == ["0000002-prompt-0.gif", "0000003-prompt-0.gif"]


def test_interrupted_tokens_start_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipes.Run(tiny_recipe(), earlier_stages(finished, "tokens", tmp_path), quiet=True)
    calls, encode = [], VQVAE.encode

    def stop_at_second(model: VQVAE, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(model, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(VQVAE, "encode", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            run.stage("tokens")
    assert not (tmp_path / OUTPUTS["tokens"][0]).exists()
    run.stage("tokens")
    for output in OUTPUTS["tokens"]:
        assert (tmp_path / output).read_bytes() == (finished / output).read_bytes()


def test_the_vocabulary_is_made_the_same_again(finished: Path, tmp_path: Path) -> None:
    recipes.Run(tiny_recipe(), tmp_path, quiet=True).stage("tokenizer")
    assert (tmp_path / "ice_text.model").read_bytes() == (finished / "ice_text.model").read_bytes()


def test_tokens_are_those_of_the_clips(finished: Path) -> None:
    run = recipes.Run(tiny_recipe(), finished, quiet=True)
    clips, stills = run.clips(), run.stills()
    assert clips.tokens.shape == (5, 17, 64) and stills.tokens.shape == (4, 1, 64)
    assert clips.tokens.dtype == torch.int64 and 0 <= clips.tokens.min() and clips.tokens.max() < 32
    scene = next(shapes.scenes("train", 1))
    assert clips.captions[0] == scene.caption
    frames = shapes.render(scene).to_pixels().transpose(0, 1)  # [C, T, H, W] -> [T, C, H, W]
    same = run.vqvae().encode(frames).flatten(1) == clips.tokens[0]
    assert same.float().mean() > 0.99  # near ties may fall otherwise in a batch of another size


def test_texts_of_samples_begin_with_their_duration(finished: Path) -> None:
    run, rng = recipes.Run(tiny_recipe(), finished), np.random.default_rng(0)
    texts, tokenizer, clips = run._texts(run.recipe.config.keyframes), run.tokenizer(), run.clips()
    samples = [data.keyframe_sample(clips, rng, 5) for _ in range(40)]
    batch = texts.clip_batch(samples, rng, recipes.keyframe_layout)
    line, silent = tokenizer.id_of("<n>"), 0
    for sample, ids, valid in zip(samples, batch.tokens, batch.text_valid, strict=True):
        said = ids[: len(valid)][valid].tolist()
        at = said.index(line)
        assert said[:at] == tokenizer.encode(f"{duration_text(sample.stride, 5, 8.0)}秒")
        silent += said[at + 1 :] == []
        assert said[at + 1 :] in ([], tokenizer.encode(sample.caption.text))
    assert 0 < silent < 12  # guidance needs samples without a caption


def test_stages_differ_from_where_they_began(finished: Path) -> None:
    weights = {name: load_file(finished / name / "weights.safetensors") for name in recipes.STAGES[3:]}
    for tensors in weights.values():
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    for before, after in (("base", "keyframes"), ("keyframes", "interpolation")):
        assert any(not torch.equal(x, weights[after][name]) for name, x in weights[before].items())


def test_the_base_stage_leaves_the_temporal_channel_and_interpolation_the_base(finished: Path) -> None:
    run = recipes.Run(tiny_recipe(), finished)
    model = run._new_transformer(run.recipe.config.keyframes, run.recipe.base.seed)
    temporal = {name: p.detach() for name, p in model.temporal_parameters()}
    base, keyframes, interpolation = (
        load_file(finished / name / "weights.safetensors") for name in recipes.STAGES[3:]
    )
    assert temporal and all(torch.equal(base[name], value) for name, value in temporal.items())
    frozen = [name for name, _ in model.base_parameters()]
    assert frozen and all(torch.equal(interpolation[name], keyframes[name]) for name in frozen)
    assert any(not torch.equal(keyframes[name], base[name]) for name in frozen)


@pytest.mark.parametrize("stage", ["base", "keyframes", "interpolation"])
def test_every_stage_logs_its_frames_and_its_speed(stage: str, finished: Path) -> None:
    frames = {"base": [], "keyframes": [1, 2, 3, 4], "interpolation": [1, 3]}[stage]
    for line in map(json.loads, (finished / stage / "log.jsonl").read_text().splitlines()):
        assert [f"frame{time}" in line for time in range(5)] == [time in frames for time in range(5)]
        assert line["tokens_per_second"] > line["samples_per_second"] > 0


def test_a_codec_that_went_on_learning_leaves_no_stage_behind(finished: Path, tmp_path: Path) -> None:
    """Its tokens are others, so a transformer of the old ones is neither skipped, continued nor exported."""
    folder = shutil.copytree(finished, tmp_path / "run")
    recipe = tiny_recipe()
    run = recipes.Run(replace(recipe, vqvae=replace(recipe.vqvae, steps=6)), folder, quiet=True)
    for stage in ("vqvae", "tokens"):
        run.stage(stage)
    with pytest.raises(SettingError, match=r"another recipe \(image_tokens differ\)"):
        run.stage("base")
    for stage, before in (("keyframes", "base"), ("interpolation", "keyframes"), ("export", "keyframes")):
        with pytest.raises(
            SettingError, match=rf"{before} learnt the tokens of another image codec than .*vqvae"
        ):
            export(run, tmp_path / "model") if stage == "export" else run.stage(stage)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "stage", "names"),
    [
        ({"num_stills": 5}, "base", "image_tokens"),
        ({"num_clips": 4}, "keyframes", "clip_tokens"),
        ({"num_clips": 4}, "interpolation", "clip_tokens"),
        ({"images_beside_clips": 3}, "keyframes", "images_beside"),
    ],
)
def test_other_tokens_are_another_recipe(
    change: dict[str, int], stage: str, names: str, finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(SettingError, match=rf"another recipe \({names} differ\)"):
        recipes.Run(replace(tiny_recipe(), **change), folder, quiet=True).stage(stage)


def test_a_finished_run_of_before_tokens_were_noted_is_exported_and_not_continued(
    finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    for path in folder.glob("*/recipe.json"):
        old = json.loads(path.read_text())
        path.write_text(
            json.dumps({k: v for k, v in old.items() if "tokens" not in k and k != "images_beside"})
        )
    run = recipes.Run(tiny_recipe(), folder, quiet=True)
    assert (export(run, tmp_path / "model") / "config.json").is_file()
    with pytest.raises(
        SettingError, match=r"does not say clip_tokens, image_tokens, images_beside, as those"
    ):
        run.stage("keyframes")


def test_a_recipe_that_somebody_changed_is_named(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "base" / "recipe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_tokens": "no key"}))
    with pytest.raises(SettingError, match=r"base/recipe\.json does not hold what this program writes there"):
        recipes.Run(tiny_recipe(), folder, quiet=True).stage("keyframes")


def test_a_stage_needs_the_earlier_ones(tmp_path: Path) -> None:
    run = recipes.Run(tiny_recipe(), tmp_path, quiet=True)
    for stage, needed in (("tokens", "vqvae"), ("keyframes", "base"), ("interpolation", "keyframes")):
        with pytest.raises(WeightsError, match=f"run the stage '{needed}' first"):
            run.stage(stage)
    with pytest.raises(SettingError, match=r"unknown stage 'vae'; legal: tokenizer, vqvae"):
        run.stage("vae")


def test_a_vocabulary_that_does_not_fit_the_preset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="the vocabulary has"):
        recipes.Run(replace(tiny_recipe(), vocab_size=70), tmp_path).stage("tokenizer")


def test_the_codec_learns_the_frames_of_clips_on_disk(tmp_path: Path) -> None:
    """Other weights than from the demo world, the same with a worker; a damaged file is passed over."""
    world(tmp_path / "clips", 3, num_frames=9)
    (tmp_path / "clips" / "videos" / "1.mkv").write_bytes(b"no video")
    weights = []
    for number, clips in enumerate(["", str(tmp_path / "clips"), str(tmp_path / "clips")]):
        recipe = replace(tiny_recipe(), vqvae_clips=clips, vqvae_workers=number // 2, continuous_steps=1)
        recipes.Run(recipe, tmp_path / str(number), quiet=True).stage("vqvae")
        weights.append(load_file(tmp_path / str(number) / "vqvae" / "weights.safetensors"))
    shapes_only, alone, with_worker = weights
    assert all(with_worker[name].equal(x) for name, x in alone.items())
    assert any(not shapes_only[name].equal(x) for name, x in alone.items())
