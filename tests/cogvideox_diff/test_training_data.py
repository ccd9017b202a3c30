"""Training samples and loss of the diffusion model, and a tiny recipe run through all its stages."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cogvideox_diff.config import ScheduleConfig, T5Config, cogvideox_demo
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.training import recipes
from cogvideox_diff.training.data import LatentClips, pixel_batch
from cogvideox_diff.training.finetune import FinetuneConfig
from cogvideox_diff.training.objective import diffusion_loss
from cogvideox_diff.training.recipes import Phase
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared import training
from shared.clips import shapes
from shared.errors import SettingError, WeightsError
from shared.training import Interrupted, TrainConfig

SCHEDULE = NoiseSchedule.from_config(ScheduleConfig(snr_shift=3.0))


# ---- samples


@pytest.mark.parametrize("num_frames", [1, 9, 17])
def test_pixel_batches_are_a_function_of_seed_and_step(num_frames: int) -> None:
    pixels = pixel_batch(1, 5, 3, num_frames)
    assert pixels.shape == (3, 3, num_frames, 64, 64) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() < pixels.max() <= 1
    assert torch.equal(pixels, pixel_batch(1, 5, 3, num_frames))
    assert not torch.equal(pixels, pixel_batch(1, 6, 3, num_frames))
    assert not torch.equal(pixels, pixel_batch(2, 5, 3, num_frames))


def test_short_clips_lie_anywhere_inside_whole_ones() -> None:
    starts = set()
    for step in range(12):
        whole, short = pixel_batch(0, step, 4, 17), pixel_batch(0, step, 4, 9)
        for clip, part in zip(whole, short, strict=True):
            places = [s for s in range(9) if torch.equal(clip[:, s : s + 9], part)]
            assert places
            starts.update(places if len(places) == 1 else ())  # a still shape fits everywhere
    assert {0, 8} <= starts


# ---- the loss


def some_latents(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_loss_is_the_released_one() -> None:
    """Error of v = error of x0 weighted with 1 / (1 - abar), whatever the model says."""
    x0, noise, said = (some_latents(4, 2, 3, 2, 2, seed=seed) for seed in range(3))
    timesteps = torch.tensor([0, 250, 600, 999])
    losses = diffusion_loss(lambda *_: said, SCHEDULE, x0, x0, timesteps, noise)
    x_t = SCHEDULE.add_noise(x0, noise, timesteps)
    errors = (SCHEDULE.x0_from_velocity(x_t, said, timesteps) - x0).square().flatten(1).mean(1)
    expected = errors / (1 - SCHEDULE.alphas_cumprod[timesteps])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-3, atol=1e-6)
    assert losses.shape == (4,)


def test_the_right_answer_costs_nothing() -> None:
    x0, noise = some_latents(2, 2, 3, 2, 2), some_latents(2, 2, 3, 2, 2, seed=1)
    timesteps = torch.tensor([10, 999])
    answer = SCHEDULE.velocity(x0, noise, timesteps)
    assert diffusion_loss(lambda *_: answer, SCHEDULE, x0, x0, timesteps, noise).tolist() == [0, 0]


def test_image_latents_go_behind_the_noisy_ones() -> None:
    x0, image, noise = (some_latents(2, 2, 3, 2, 2, seed=seed) for seed in range(3))
    timesteps, ofs, asked = torch.tensor([10, 500]), torch.full((2,), 2.0), []

    def model(x: Tensor, text: Tensor, t: Tensor, given_ofs: Tensor) -> Tensor:
        asked.append((x, text, t, given_ofs))
        return x[:, :, :3]

    diffusion_loss(model, SCHEDULE, x0, noise, timesteps, noise, image_latents_BTCHW=image, ofs=ofs)
    ((x, text, t, given_ofs),) = asked
    assert torch.equal(x[:, :, :3], SCHEDULE.add_noise(x0, noise, timesteps))
    assert torch.equal(x[:, :, 3:], image)
    assert text is noise and t is timesteps and given_ofs is ofs


class Listener:
    """Stands for both nets and keeps what they are asked."""

    def __init__(self) -> None:
        self.noisy: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.ids: list[Tensor] = []
        self.config = SimpleNamespace(patch_size=(1, 1, 1))

    def text_encoder(self, ids: Tensor) -> Tensor:
        self.ids.append(ids)
        return ids[..., None].float()

    def __call__(self, x: Tensor, text: Tensor, timesteps: Tensor, ofs: Tensor | None) -> Tensor:
        self.noisy.append(x)
        self.timesteps.append(timesteps)
        return torch.zeros_like(x)


def batch_loss(listener: Listener, clips: LatentClips, size: int, seed: int) -> Tensor:
    ids = {text: torch.tensor([i]) for i, text in enumerate(sorted(recipes._texts()))}
    model = SimpleNamespace(text_encoder=listener.text_encoder, transformer=listener)
    rng = np.random.default_rng(seed)
    return recipes._batch_loss(model, SCHEDULE, 0.5, ids, clips, size, rng)[0]  # type: ignore[arg-type]


def numbered_latents(num_frames: int) -> LatentClips:
    captions = tuple(shapes.captions()[::40])
    loud = 50 * some_latents(len(captions), num_frames, 2, 2, 2)  # so that noise cannot hide which is which
    return LatentClips(latents=loud.half(), captions=captions)


@pytest.mark.parametrize("size", [1, 8, 20, 60])
def test_timesteps_cover_every_interval(size: int) -> None:
    listener, orders = Listener(), set()
    for seed in range(20):
        batch_loss(listener, numbered_latents(2), size, seed)
        timesteps = listener.timesteps[-1]
        width = 1000 / size
        lowest = torch.arange(size) * width
        ordered = timesteps.sort().values
        assert timesteps.dtype == torch.int64
        assert (ordered >= lowest.floor()).all() and (ordered < lowest + width).all()
        orders.add(tuple(timesteps.argsort().tolist()))
    assert len(orders) > 1 or size == 1  # which clip gets which interval is drawn
    drawn = torch.cat(listener.timesteps)
    assert 0 <= drawn.min() and drawn.max() <= 999
    assert len(drawn.unique()) > 0.5 * min(len(drawn), 1000)


@pytest.mark.parametrize("num_frames", [1, 5])
def test_texts_say_what_the_latents_show(num_frames: int) -> None:
    listener, clips = Listener(), numbered_latents(num_frames)
    losses = [batch_loss(listener, clips, 16, seed) for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]
    texts = sorted(recipes._texts())
    legal = {c.image_text if num_frames == 1 else c.text for c in clips.captions}
    said = [texts[int(i)] for ids in listener.ids for i in ids]
    assert set(said) - {""} <= legal and len(set(said)) > 5
    assert 0 < said.count("") < 0.3 * len(said)
    for text, x, t in zip(said, torch.cat(listener.noisy), torch.cat(listener.timesteps), strict=True):
        if t > 600 or not text:
            continue
        captions = [c.image_text if num_frames == 1 else c.text for c in clips.captions]
        scale = 0.5 * SCHEDULE.alphas_cumprod[t].sqrt()
        distances = (clips.latents.double() * scale - x).square().flatten(1).mean(1)
        assert captions[int(distances.argmin())] == text


# ---- a recipe at work


def tiny_recipe() -> recipes.Recipe:
    """The demo with one layer, eight channels and three steps a stage."""
    demo = cogvideox_demo()
    text = T5Config(text_len=16, vocab_size=192, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    steps = TrainConfig(steps=3, warmup_steps=1, ema_decay=0.5, save_every=99, log_every=1, optimizer="muon")
    return recipes.Recipe(
        config=replace(
            demo,
            text=text,
            transformer=replace(
                demo.transformer,
                num_layers=1,
                num_heads=2,
                head_dim=16,
                in_channels=4,
                out_channels=4,
                time_embed_dim=16,
                text_dim=16,
            ),
            vae=replace(demo.vae, widths=(4, 4, 4, 4), norm_groups=2, latent_channels=4),
        ),
        vae=steps,
        vae_phases=(
            Phase(begin=0.0, num_frames=1, batch=2),
            Phase(begin=0.3, num_frames=9, batch=1),
            Phase(begin=0.6, num_frames=17, batch=1),
        ),
        transformer=steps,
        clip_batch=2,
        still_batch=3,
        still_steps=2,
        num_clips=5,
        num_stills=4,
        image_to_video=FinetuneConfig(task="i2v", rank=2, alpha=2.0, batch=2),
        image_to_video_train=replace(steps, optimizer="adamw"),
    )


OUTPUTS = {
    "tokenizer": ["tokenizer/spiece.model"],
    "vae": ["vae/weights.safetensors"],
    "latents": ["latents/clips.safetensors", "latents/stills.safetensors"],
    "transformer": ["transformer/weights.safetensors"],
    "image_to_video": ["image_to_video/weights.safetensors"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has run to its end."""
    folder = tmp_path_factory.mktemp("diffusion")
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


@pytest.mark.parametrize("stage", ["vae", "transformer", "image_to_video"])
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


def test_interrupted_latents_start_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipes.Run(tiny_recipe(), earlier_stages(finished, "latents", tmp_path), quiet=True)
    calls, encode = [], CausalVAE.encode

    def stop_at_second(model: CausalVAE, pixels: Tensor):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(model, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(CausalVAE, "encode", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            run.stage("latents")
    assert not (tmp_path / OUTPUTS["latents"][0]).exists()
    run.stage("latents")
    for output in OUTPUTS["latents"]:
        assert (tmp_path / output).read_bytes() == (finished / output).read_bytes()


def test_the_vocabulary_is_made_the_same_again(finished: Path, tmp_path: Path) -> None:
    (output,) = OUTPUTS["tokenizer"]
    recipes.Run(tiny_recipe(), tmp_path, quiet=True).stage("tokenizer")
    assert (tmp_path / output).read_bytes() == (finished / output).read_bytes()


def test_latents_are_those_of_the_clips(finished: Path) -> None:
    run = recipes.Run(tiny_recipe(), finished, quiet=True)
    clips, stills = run.clips(), run.stills()
    assert clips.latents.shape == (5, 5, 4, 8, 8) and stills.latents.shape == (4, 1, 4, 8, 8)
    scenes = list(islice(shapes.scenes("train", 1), 5))
    assert clips.captions == tuple(scene.caption for scene in scenes)
    with torch.no_grad():
        mean = run.vae().encode(shapes.render(scenes[4]).to_pixels()[None]).mean[0].transpose(0, 1)
    difference = clips.latents[4].float() - mean
    assert difference.square().mean() < 0.03**2 * mean.var()  # encoded in bfloat16, stored as float16


def test_the_scaling_factor_gives_unit_variance_around_the_background(finished: Path) -> None:
    run = recipes.Run(tiny_recipe(), finished, quiet=True)
    scaled = run.clips().latents.float() * run.scaling_factor()
    deviation = scaled - scaled.flatten(3).median(dim=3).values[:, :, :, None, None]
    assert float(deviation.std()) == pytest.approx(1, rel=2e-3)


def test_the_trained_nets_come_back_whole(finished: Path) -> None:
    run = recipes.Run(tiny_recipe(), finished, quiet=True)
    model, fresh = run.joint_model(), recipes.JointModel(run.recipe.config, run.recipe.transformer.seed)
    saved = load_file(finished / "transformer" / "weights.safetensors")
    for (name, value), new in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.isfinite(value).all()
        assert name not in saved or torch.equal(value, saved[name])
        assert value.shape == new.shape
    moved = [
        n for (n, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True) if (p != q).any()
    ]
    assert any(name.startswith("text_encoder") for name in moved)
    assert any(name.startswith("transformer.blocks") for name in moved)


def test_stills_alone_come_first(finished: Path) -> None:
    lines = (finished / "transformer" / "log.jsonl").read_text().splitlines()
    assert [('"video"' in line, '"image"' in line) for line in lines] == [(False, True)] * 2 + [(True, True)]


def test_a_stage_needs_the_earlier_ones(tmp_path: Path) -> None:
    run = recipes.Run(tiny_recipe(), tmp_path, quiet=True)
    for stage, needed in (("latents", "vae"), ("transformer", "vae")):
        with pytest.raises(WeightsError, match=f"run the stage '{needed}' first"):
            run.stage(stage)
    with pytest.raises(SettingError, match=r"unknown stage 'vqvae'; legal: tokenizer, vae"):
        run.stage("vqvae")


def test_a_vocabulary_larger_than_the_text_encoder_is_an_error(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    text = replace(recipe.config.text, vocab_size=50)
    with pytest.raises(SettingError, match="text encoder 50"):
        recipes.Run(replace(recipe, config=replace(recipe.config, text=text)), tmp_path).stage("tokenizer")
