"""Options of a recipe that the demo does not use: growing sizes, packs, a quality stage, averages, a GAN."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cogvideox_diff.config import VAEConfig, cogvideox_demo
from cogvideox_diff.training import recipes
from cogvideox_diff.training.data import LatentClips
from cogvideox_diff.training.recipes import Phase, Recipe, Resolution, Run, clearest
from cogvideox_diff.training.vae_gan import GanConfig
from shared.clips import shapes
from shared.errors import SettingError
from shared.training import Interrupted, TrainConfig
from tests.shared.clip_files import world

QUICK = TrainConfig(steps=4, lr=1e-3, warmup_steps=1, log_every=1)


def tiny_recipe(**options: Any) -> Recipe:
    config = cogvideox_demo()
    vae = VAEConfig(**{name: getattr(config.vae, name) for name in ("sample_size", "encode_frames")},
                    widths=(8, 8, 8, 16), blocks_per_level=1, norm_groups=4, decode_latents=0,
                    scaling_factor=1.0)  # fmt: skip
    config = replace(
        config,
        vae=vae,
        transformer=replace(config.transformer, num_layers=1, num_heads=2, head_dim=16),
    )
    return Recipe(
        config=config, vae=QUICK, vae_phases=(Phase(begin=0.0, num_frames=1, batch=1),
                                              Phase(begin=0.5, num_frames=5, batch=1)),
        transformer=QUICK, quality=replace(QUICK, lr=1e-4, ema_decay=0.5),
        clip_batch=2, still_batch=2, still_steps=0, num_clips=4, num_stills=4, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with vocabulary, VAE and latents."""
    folder = tmp_path_factory.mktemp("run")
    recipe = tiny_recipe()
    recipe = replace(recipe, vae=replace(QUICK, steps=1), vae_phases=recipe.vae_phases[:1])
    run = Run(recipe, folder, quiet=True)
    for stage in ("tokenizer", "vae", "latents"):
        run.stage(stage)
    return folder


def run_in(prepared: Path, tmp_path: Path, **options: Any) -> Run:
    for name in ("tokenizer", "vae", "latents"):
        (tmp_path / name).symlink_to(prepared / name)
    return Run(tiny_recipe(**options), tmp_path, quiet=True)


def sizes_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Latent (frames, rows, columns) of every batch of clips."""
    seen, inner = [], recipes.diffusion_loss

    def spy(model: Any, schedule: Any, x0: Tensor, *more: Any, **options: Any) -> Tensor:
        if x0.shape[1] > 1:
            seen.append((x0.shape[1], *x0.shape[3:]))
        return inner(model, schedule, x0, *more, **options)

    monkeypatch.setattr(recipes, "diffusion_loss", spy)
    return seen


def test_sizes_grow_and_a_resumed_run_is_the_uninterrupted_one(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also across the border of two stages."""
    seen = sizes_seen(monkeypatch)
    stages = (Resolution(begin=0.0, size=32, num_frames=9), Resolution(begin=0.5, size=64))
    (tmp_path / "whole").mkdir()
    whole = run_in(prepared, tmp_path / "whole", resolutions=stages)
    whole.stage("transformer")
    assert seen == [(3, 4, 4)] * 2 + [(5, 8, 8)] * 2

    (tmp_path / "parts").mkdir()
    parts = run_in(prepared, tmp_path / "parts", resolutions=stages)
    inner, calls = recipes._batch_loss, []

    def stopping(*args: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        calls.append(1)
        if len(calls) == 3:  # in the second step, the last of the smaller size
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args, **options)

    monkeypatch.setattr(recipes, "_batch_loss", stopping)
    with pytest.raises(Interrupted):
        parts.stage("transformer")
    monkeypatch.setattr(recipes, "_batch_loss", inner)
    parts.stage("transformer")
    one, two = (load_file(run.folder / "transformer" / "weights.safetensors") for run in (whole, parts))
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize("pack", [False, True])
def test_the_log_tells_losses_by_timestep_and_tokens(prepared: Path, tmp_path: Path, pack: bool) -> None:
    """Of clips and stills together, packed into one row or not."""
    run_in(prepared, tmp_path, pack=pack).stage("transformer")
    log = [json.loads(line) for line in (tmp_path / "transformer" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    common = {"loss", "lr", "grad_norm", "memory_bytes", "samples_per_second", "tokens_per_second"}
    for line in log:
        assert common <= line.keys()
        assert any(name.startswith("timesteps") for name in line)
        assert line["tokens_per_second"] > 5 * line["samples_per_second"]


def test_samples_that_are_drawn_on_the_way_change_nothing(prepared: Path, tmp_path: Path) -> None:
    weights = []
    for name, options in (("plain", {}), ("drawn", {"sample_prompt": "a red circle"})):
        (tmp_path / name).mkdir()
        run = run_in(prepared, tmp_path / name, **options)
        run = replace(run, recipe=replace(run.recipe, transformer=replace(QUICK, sample_every=3)))
        run.stage("transformer")
        weights.append((run.folder / "transformer" / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]
    drawn = sorted(path.name for path in (tmp_path / "drawn" / "transformer" / "samples").iterdir())
    assert drawn == ["0000003-prompt-0.gif", "0000004-prompt-0.gif"]


def test_the_quality_stage_goes_on_from_the_transformer(prepared: Path, tmp_path: Path) -> None:
    """Its weights, which are averages, are then the model's."""
    run = run_in(prepared, tmp_path)
    run.stage("transformer")
    before = run.joint_model().state_dict()
    run.stage("quality")
    after, state = run.joint_model().state_dict(), torch.load(tmp_path / "quality" / "state.pt")
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < moved < 5e-3
    assert "quality" not in recipes.STAGES  # the demo's recipe stays as it was
    assert state["ema"] is not None


def test_the_codec_learns_clips_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the sizes of its phases, decoded by whom it may be; a damaged file is passed over."""
    world(tmp_path / "clips", 3, num_frames=9)
    (tmp_path / "clips" / "videos" / "1.mkv").write_bytes(b"no video")
    seen, weights, inner = [], [], recipes.CausalVAE.encode

    def spy(self: Any, pixels: Tensor, **options: Any) -> Any:
        seen.append(tuple(pixels.shape))
        return inner(self, pixels, **options)

    monkeypatch.setattr(recipes.CausalVAE, "encode", spy)
    for workers in (0, 1):
        recipe = tiny_recipe(vae_clips=str(tmp_path / "clips"), vae_workers=workers)
        first, second = recipe.vae_phases
        recipe = replace(recipe, vae_phases=(first, replace(second, num_frames=9)))
        Run(recipe, tmp_path / str(workers), quiet=True).stage("vae")
        weights.append(load_file(tmp_path / str(workers) / "vae" / "weights.safetensors"))
    assert seen[:4] == [(1, 3, 1, 64, 64)] * 2 + [(1, 3, 9, 64, 64)] * 2
    assert all(weights[0][name].equal(x) for name, x in weights[1].items())


def test_the_clearest_clips_are_those_that_stand_out() -> None:
    latents = torch.zeros(8, 2, 3, 4, 4)
    latents[:, :, :, 0, 0] = torch.arange(8.0)[:, None, None]
    captions = tuple(shapes.captions()[:8])
    best = clearest(LatentClips(latents=latents, captions=captions), 0.25)
    assert best.captions == captions[6:]
    with pytest.raises(SettingError, match="quality_share"):
        clearest(best, 0.0)


def test_the_codec_trains_against_a_discriminator(tmp_path: Path) -> None:
    gan = GanConfig(perceptual=0.5, adversarial=0.1, start=2, width=4, depth=3)
    phases = (Phase(begin=0.0, num_frames=1, batch=2),)
    run = Run(replace(tiny_recipe(vae_gan=gan), vae_phases=phases), tmp_path, quiet=True)
    run.stage("vae")
    log = [json.loads(line) for line in (tmp_path / "vae" / "log.jsonl").read_text().splitlines()]
    assert ["discriminator" in line for line in log] == [False, False, True, True]
    assert run.vae().config == run.recipe.config.vae  # the file holds the codec alone
