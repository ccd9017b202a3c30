"""The VAE's losses: what each term moves, and that the discriminator learns to tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogvideox_diff.training.perceptual import VGG16, fixed_seed_features, load_perceptual
from cogvideox_diff.training.vae_gan import (
    MOST_WEIGHT,
    AdversarialVAE,
    Discriminator3D,
    GanConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from cogvideox_diff.vae.autoencoder import CausalVAE, Posterior
from shared.checkpoints import save_tensors
from shared.clips import shapes
from shared.errors import SettingError, WeightsError
from tests.cogvideox_diff.tiny_pipeline import tiny_config


def clips(count: int, frames: int = 9, size: int = 32) -> Tensor:
    scenes = [scene for scene, _ in zip(shapes.scenes("train", 0), range(count), strict=False)]
    return torch.stack([shapes.render(s, num_frames=frames, size=size).to_pixels() for s in scenes])


def net(**settings: Any) -> AdversarialVAE:
    torch.manual_seed(0)
    return AdversarialVAE(CausalVAE(tiny_config("5b").vae), GanConfig(width=4, depth=3, **settings))


def step_loss(model: AdversarialVAE, step: int, pixels: Tensor) -> tuple[Tensor, dict[str, float]]:
    posterior = model.vae.encode(pixels)
    return model.loss(pixels, model.vae.decode(posterior.mode()), posterior, step, frame=2)


def test_the_discriminator_is_untouched_and_unheard_before_its_start() -> None:
    model, pixels = net(adversarial=0.5, start=10), clips(1)
    before, told = step_loss(model, 9, pixels)
    before.backward()
    assert "generator" not in told
    assert all(p.grad is None for p in model.discriminator.parameters())
    after, told = step_loss(model, 10, pixels)
    after.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.discriminator.named_parameters()
               if n.endswith("weight"))  # fmt: skip
    assert told["adaptive_weight"] > 0


def test_each_net_gets_the_gradient_of_its_own_loss_alone() -> None:
    model, pixels = net(adversarial=0.5), clips(1)
    posterior = model.vae.encode(pixels)
    decoded = model.vae.decode(posterior.mode())
    loss, _ = model.loss(pixels, decoded, posterior, 0, frame=0)
    loss.backward()
    got = [p.grad.clone() for p in model.discriminator.parameters() if p.grad is not None]
    model.zero_grad()
    real, fake = model.discriminator(pixels), model.discriminator(decoded.detach())
    discriminator_loss(real, fake).backward()
    wanted = [p.grad for p in model.discriminator.parameters()]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert all(p.grad is None for p in model.vae.parameters())


def test_gradients_reach_the_first_frame_of_the_encoder_from_every_term() -> None:
    pixels = clips(1).requires_grad_(True)
    for settings in ({"perceptual": 1.0}, {"adversarial": 1.0}):
        pixels.grad = None
        step_loss(net(**settings), 0, pixels)[0].backward()
        assert pixels.grad is not None
        assert pixels.grad[:, :, 0].abs().sum() > 0


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_the_discriminator_learns_to_tell(kind: Any) -> None:
    """True clips from the same clips in blocks of 4 x 4 pixels, and then on clips that it has not seen."""
    torch.manual_seed(0)
    model = Discriminator3D(GanConfig(width=8, depth=3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def blocky(x: Tensor) -> Tensor:
        return nn.functional.interpolate(nn.functional.avg_pool3d(x, (1, 4, 4)), scale_factor=(1, 4, 4))

    clips_seen = clips(64, frames=5)
    losses = []
    for step in range(40):
        real = clips_seen[step * 8 % 56 :][:8]
        loss = discriminator_loss(model(real), model(blocky(real)), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        true, false = model(clips_seen[56:]).mean(1), model(blocky(clips_seen[56:])).mean(1)
    assert (true > false).float().mean() >= 0.75
    assert true.mean() > false.mean()
    assert sum(losses[-8:]) < sum(losses[:8])


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert float(discriminator_loss(real, fake)) == pytest.approx(0.5 * (0.5 + 0.75))
    assert float(generator_loss(fake)) == pytest.approx(1.25)
    assert float(generator_loss(torch.zeros(3), "non_saturating")) == pytest.approx(0.6931, abs=1e-4)
    posterior = Posterior(mean=torch.ones(2, 1, 1, 1, 1), logvar=torch.zeros(2, 1, 1, 1, 1))
    assert float(posterior.kl()) == pytest.approx(0.5)


def test_the_adaptive_weight_balances_the_pulls_and_is_no_part_of_the_graph() -> None:
    last = torch.tensor([3.0], requires_grad=True)
    weight = adaptive_weight((6 * last).sum(), (2 * last).sum(), last)
    assert float(weight) == pytest.approx(3.0, rel=1e-3)
    assert not weight.requires_grad
    assert float(adaptive_weight((6e9 * last).sum(), (2 * last).sum(), last)) == MOST_WEIGHT


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_the_discriminator_reads_any_legal_length(frames: int) -> None:
    logits = Discriminator3D(GanConfig(width=4, depth=3))(torch.zeros(2, 3, frames, 32, 32))
    assert logits.shape == (2, {1: 1, 5: 2, 9: 3, 17: 5}[frames])


def test_the_default_perceptual_net_is_the_same_everywhere_and_sees_blur() -> None:
    judge = fixed_seed_features()
    assert judge.name == "fixed-seed features"
    first = next(judge.parameters())
    assert first.equal(next(fixed_seed_features().parameters()))
    assert not any(p.requires_grad for p in judge.parameters())
    x = clips(2)[:, :, 0]
    blurred = nn.functional.avg_pool2d(x, 5, 1, 2)
    assert torch.equal(judge(x, x), torch.zeros(2))
    assert (judge(x, blurred) > judge(x, nn.functional.avg_pool2d(x, 3, 1, 1))).all()


def test_a_perceptual_net_may_be_a_file(tmp_path: Path) -> None:
    inputs, tensors = 3, {}
    for k, level in enumerate(VGG16):
        for i in level:
            tensors[f"features.{i}.weight"] = torch.randn(4, inputs, 3, 3)
            tensors[f"features.{i}.bias"] = torch.randn(4)
            inputs = 4
        tensors[f"lin{k}.model.1.weight"] = torch.full((1, 4, 1, 1), 2.0)
    x, y = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    lpips = load_perceptual(save_tensors(tensors, tmp_path / "lpips.safetensors"))
    plain = {name: t for name, t in tensors.items() if not name.startswith("lin")}
    vgg = load_perceptual(save_tensors(plain, tmp_path / "vgg.safetensors"))
    torch.testing.assert_close(lpips(x, y), 2 * vgg(x, y))
    script = tmp_path / "net.pt"
    torch.jit.script(nn.Conv2d(3, 4, 3)).save(script)
    assert load_perceptual(script)(x, y).shape == (2,)
    save_tensors({"features.0.weight": torch.zeros(2, 3, 3, 3)}, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match="VGG16"):
        load_perceptual(tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match="no file"):
        load_perceptual(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no net")
    with pytest.raises(WeightsError, match="neither"):
        load_perceptual(tmp_path / "text.pt")


def test_bad_settings_are_refused() -> None:
    with pytest.raises(SettingError, match="hinge"):
        GanConfig(loss="wgan")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="start"):
        GanConfig(start=-1)
    assert not GanConfig().active
