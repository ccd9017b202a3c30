"""Finetuning: what is trained, on what, and models stored as a difference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvideox_diff import CogVideoXPipeline, lora
from cogvideox_diff.delta import DELTA, apply_delta, save_delta
from cogvideox_diff.formats import FAMILY, FORMAT, OUR_CONFIG
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.training import finetune
from cogvideox_diff.training.finetune import FinetuneConfig, Samples, objective, trainable, widen_for_images
from cogvideox_diff.training.objective import loss_by_timestep
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.checkpoints import load_tensors, save_tensors
from shared.config_io import save_config
from shared.errors import SettingError, WeightsError
from shared.files import machine
from shared.training import TrainConfig, train
from tests.cogvideox_diff.tiny_pipeline import (
    FRAMES,
    HEIGHT,
    PROMPT,
    WIDTH,
    make,
    tiny_config,
    write_tokenizer,
)

VARIANTS = ("2b", "5b", "1.5")


def tiny_pipeline(variant: str, tokenizer: Path = Path()) -> CogVideoXPipeline:
    """A tokenizer is needed where text is read or a folder is written."""
    return make(variant, tokenizer)


def samples(pipeline: CogVideoXPipeline, count: int = 4) -> Samples:
    net, rng = pipeline.config.transformer, torch.Generator().manual_seed(3)
    shape = (count, (FRAMES - 1) // 4 + 1, net.out_channels, HEIGHT // 8, WIDTH // 8)
    frames = torch.randint(256, (count, HEIGHT, WIDTH, 3), generator=rng, dtype=torch.uint8)
    return Samples(
        latents=torch.randn(shape, generator=rng),
        features=torch.randn(2, net.text_len, net.text_dim, generator=rng),
        caption=torch.arange(count) % 2,
        unconditional=torch.zeros(net.text_len, net.text_dim),
        first_frames=frames,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_widened_model_gives_what_the_narrow_one_gives_for_any_image(variant: str) -> None:
    narrow = tiny_pipeline(variant).parts.transformer
    wide, net = widen_for_images(narrow), narrow.config
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 2 * net.patch_size[0], net.out_channels, 4, 6, generator=rng)
    images = torch.randn(latents.shape, generator=rng)
    text, time = torch.randn(1, net.text_len, net.text_dim, generator=rng), torch.tensor([400])
    with torch.no_grad():
        both = torch.cat([latents, images], dim=2)
        torch.testing.assert_close(wide(both, text, time), narrow(latents, text, time), rtol=0, atol=1e-6)
    assert wide.config == replace(net, in_channels=2 * net.out_channels)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_trained(task: str, method: str) -> None:
    settings = FinetuneConfig(task=task, method=method, rank=2, alpha=2.0)  # type: ignore[arg-type]
    model = trainable(tiny_pipeline("5b").parts.transformer, settings)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    everything = {name for name, _ in model.named_parameters()}
    if method == "full":
        assert trained == everything
        return
    embedding = {"patch_embed.proj.weight", "patch_embed.proj.bias"} if task == "i2v" else set()
    assert trained == {name for name in everything if ".lora_" in name} | embedding
    assert {".".join(name.split(".")[2:4]) for name in trained - embedding} == set(lora.TARGETS)


def test_an_image_model_is_not_widened_again() -> None:
    model = tiny_pipeline("5b-i2v").parts.transformer
    assert trainable(model, FinetuneConfig(task="i2v", rank=2)) is model
    assert not model.patch_embed.proj.weight.requires_grad


def loss_of(pipeline: CogVideoXPipeline, settings: FinetuneConfig, step: int = 0, seed: int = 0) -> Tensor:
    model = trainable(pipeline.parts.transformer, settings)
    config = replace(pipeline.config, transformer=model.config)
    return objective(model, pipeline.parts.vae, samples(pipeline), config, settings, seed=seed)(step)[0]


@pytest.mark.parametrize("variant", ["2b", "5b", "5b-i2v", "1.5", "1.5-i2v"])
def test_every_variant_learns_its_task(variant: str) -> None:
    """The loss on one clip falls; odd latent counts of 1.5 are padded."""
    settings = FinetuneConfig(
        task="i2v" if variant.endswith("i2v") else "t2v", method="full", batch=4, text_dropout=0.0
    )
    pipeline = tiny_pipeline(variant)
    model = trainable(pipeline.parts.transformer, settings)
    loss = objective(model, pipeline.parts.vae, samples(pipeline, 1), pipeline.config, settings, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        value, _ = loss(step)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_loss_depends_on_step_and_seed_alone() -> None:
    settings = FinetuneConfig(task="i2v", rank=2, batch=2)
    first, again = (loss_of(tiny_pipeline("5b"), settings) for _ in range(2))
    assert first.equal(again)
    assert not first.equal(loss_of(tiny_pipeline("5b"), settings, step=1))
    assert not first.equal(loss_of(tiny_pipeline("5b"), settings, seed=1))


def test_timesteps_cover_the_intervals_and_text_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(model, schedule, x0, text, timesteps, noise, **more) -> Tensor:
        seen.append((text, timesteps, more["image_latents_BTCHW"]))
        return torch.zeros(len(x0))

    monkeypatch.setattr(finetune, "diffusion_loss", spy)
    settings = FinetuneConfig(task="i2v", rank=2, batch=8, text_dropout=0.5, image_dropout=0.5)
    pipeline = tiny_pipeline("5b")
    model = trainable(pipeline.parts.transformer, settings)
    config = replace(pipeline.config, transformer=model.config)
    loss = objective(model, pipeline.parts.vae, samples(pipeline), config, settings, seed=0)
    for step in range(40):
        loss(step)
    total = NoiseSchedule.from_config(config.schedule).num_timesteps
    for _, timesteps, images in seen:
        assert sorted((timesteps * 8 // total).tolist()) == list(range(8))
        assert not images[:, 1:].any()
    texts = torch.cat([text for text, _, _ in seen]).flatten(1)
    assert 0.3 < float((texts == 0).all(dim=1).float().mean()) < 0.7
    without = [not images.any() for _, _, images in seen]
    assert 0.25 < sum(without) / len(without) < 0.75


def test_images_carry_noise_of_the_named_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def spy(vae: CausalVAE, pixels: Tensor, noise: Tensor, **more: object) -> Tensor:
        given.append(pixels)
        return torch.zeros(noise.shape)

    monkeypatch.setattr(finetune.conditioning, "encode", spy)
    settings = FinetuneConfig(task="i2v", rank=2, batch=4, image_noise=(-2.0, 0.0))
    pipeline = tiny_pipeline("5b")
    loss_of(pipeline, settings)
    frames = samples(pipeline).first_frames
    assert frames is not None
    clean = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    for noisy in given[0][:, :, 0]:
        off = min((noisy - clean), key=lambda d: float(d.square().mean()))
        assert float(off.std()) == pytest.approx(torch.tensor(-2.0).exp().item(), rel=0.1)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(SettingError, match="lora or full"):
        FinetuneConfig(method="dora")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="batch"):
        FinetuneConfig(batch=0)
    with pytest.raises(SettingError, match="text_dropout"):
        FinetuneConfig(text_dropout=1.0)
    pipeline = tiny_pipeline("5b")
    without = replace(samples(pipeline), first_frames=None)
    with pytest.raises(SettingError, match="first frames"):
        objective(pipeline.parts.transformer, pipeline.parts.vae, without, pipeline.config,
                  FinetuneConfig(task="i2v"), seed=0)  # fmt: skip


def trained_adapter(pipeline: CogVideoXPipeline, folder: Path):
    settings = FinetuneConfig(task="i2v", rank=2, alpha=4.0, batch=2)
    model = trainable(pipeline.parts.transformer, settings)
    config = replace(pipeline.config, transformer=model.config)
    loss = objective(model, pipeline.parts.vae, samples(pipeline), config, settings, seed=0)
    train(model, loss, TrainConfig(steps=4, lr=1e-2, warmup_steps=1), folder, quiet=True)
    return model, config


def test_a_difference_loads_as_the_whole_model(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("5b", write_tokenizer(tmp_path / "words"))
    pipeline.save_pretrained(tmp_path / "base")
    model, config = trained_adapter(tiny_pipeline("5b"), tmp_path / "run")
    base = load_tensors(tmp_path / "base" / "transformer.safetensors")
    folder = tmp_path / "base" / "image_to_video"
    folder.mkdir(parents=True)
    half = folder / f".config.{machine()}.4194303.tmp.json"  # of a process that was killed
    half.touch()
    save_delta(model, base, folder)
    assert not half.exists()
    save_config(config, folder / OUR_CONFIG, family=FAMILY, format=FORMAT, dtype="float32", base="..")
    assert {name.split(".")[0] for name in load_tensors(folder / DELTA)} == {"patch_embed", "blocks"}
    lora.merge(model)
    whole, restored = lora.base_weights(model), apply_delta(base, folder)
    assert restored.keys() == whole.keys()
    for name, x in restored.items():
        torch.testing.assert_close(x.float(), whole[name], rtol=0, atol=2e-3)  # stored in float16
    loaded = CogVideoXPipeline.from_pretrained(folder)
    assert loaded.tasks == {"i2v"}
    image = torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.uint8)
    video = loaded(PROMPT, image=image, num_frames=FRAMES, height=HEIGHT, width=WIDTH, num_inference_steps=2)
    assert video.frames.shape == (FRAMES, HEIGHT, WIDTH, 3)


def test_a_difference_from_another_model_is_refused(tmp_path: Path) -> None:
    save_tensors({"blocks.9.attn.q.weight": torch.zeros(2, 2)}, tmp_path / DELTA)
    with pytest.raises(WeightsError, match=r"blocks\.9"):
        apply_delta(tiny_pipeline("5b").parts.transformer.state_dict(), tmp_path)


def test_tiny_variants_are_the_released_ones() -> None:
    assert tiny_config("5b-i2v").transformer.in_channels == 2 * tiny_config("5b").transformer.in_channels


def test_losses_are_told_by_fifths_of_the_timesteps() -> None:
    losses, timesteps = torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0, 199, 200, 999])
    figures = loss_by_timestep(losses, timesteps, 1000)
    assert figures == {"timesteps0-199": (3.0, 2), "timesteps200-399": (3.0, 1), "timesteps800-999": (5.0, 1)}
