"""Frame pack: a pack is its samples, each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideox_diff.config import ScheduleConfig
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.training.objective import diffusion_loss
from cogvideox_diff.training.pack import (
    Pack,
    PackPlan,
    first_fit,
    num_tokens,
    packed_forward,
    packed_loss,
)
from cogvideox_diff.transformer import ExpertTransformer
from shared.errors import SettingError
from shared.training_memory import recomputed
from tests.cogvideox_diff.tiny_lora import tiny_model
from tests.figures import record_figure

VARIANTS: dict[str, dict[str, Any]] = {
    "2b": {"position": "sincos"},
    "5b": {"position": "rope"},
    "1.5": {"position": "rope", "grid_rule": "slice", "patch_size": (2, 2, 2), "sample_size": (6, 12, 12)},
    "1.5-ofs": {"position": "rope", "grid_rule": "slice", "patch_size": (2, 2, 2),
                "sample_size": (6, 12, 12), "ofs_embed_dim": 24},
}  # fmt: skip
SIZES = ((1, 4, 6), (3, 4, 6), (2, 6, 4), (5, 2, 2))  # images and clips (T, H, W), in patches of time
STEPS = torch.tensor([999, 400, 17, 730])


def model_of(variant: str) -> ExpertTransformer:
    model = tiny_model(**VARIANTS[variant])
    return model.requires_grad_(True)


def inputs(model: ExpertTransformer, seed: int = 5) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    rng, net = torch.Generator().manual_seed(seed), model.config
    t = net.patch_size[0]
    shapes = [(t * frames, net.in_channels, rows, columns) for frames, rows, columns in SIZES]
    x0, noise = ([torch.randn(shape, generator=rng) for shape in shapes] for _ in range(2))
    texts = [torch.randn(length, net.text_dim, generator=rng) for length in (5, 3, 5, 1)]
    return x0, noise, texts


def offset(model: ExpertTransformer, count: int) -> Tensor | None:
    return torch.full((count,), 2.0) if model.config.ofs_embed_dim else None


def gradients(model: ExpertTransformer) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("method", ["slices", "mask"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_are_those_of_the_samples_alone(variant: str, method: Any) -> None:
    model, schedule = model_of(variant), NoiseSchedule.from_config(ScheduleConfig())
    x0, noise, texts = inputs(model)
    alone = [
        diffusion_loss(model, schedule, x[None], text[None], step[None], n[None], ofs=offset(model, 1))
        for x, n, text, step in zip(x0, noise, texts, STEPS, strict=True)
    ]
    wanted = torch.cat(alone)
    wanted.mean().backward()
    wanted_gradient = gradients(model)
    model.zero_grad()
    packed = packed_loss(model, schedule, x0, texts, STEPS, noise, ofs=offset(model, 4), method=method)
    packed.mean().backward()
    got = gradients(model)
    apart = float(((packed - wanted).abs() / wanted).max().detach())
    gradient_apart = float((got - wanted_gradient).norm() / wanted_gradient.norm())
    record_figure(f"frame pack, {variant}, {method}: loss", apart, 1e-5)
    record_figure(f"frame pack, {variant}, {method}: gradient", gradient_apart, 1e-5)
    assert apart <= 1e-5
    assert gradient_apart <= 1e-5


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5"])
def test_a_sample_does_not_see_the_others(variant: str) -> None:
    model = model_of(variant)
    x0, other, texts = inputs(model)
    with torch.no_grad():
        before = packed_forward(model, x0, texts, STEPS)
        changed = [other[0], *x0[1:]]
        after = packed_forward(model, changed, texts, torch.tensor([3, *STEPS[1:].tolist()]))
    assert not before[0].equal(after[0])
    for one, two in zip(before[1:], after[1:], strict=True):
        assert one.equal(two)


def test_blocks_may_be_computed_again() -> None:
    model, schedule = model_of("5b"), NoiseSchedule.from_config(ScheduleConfig())
    x0, noise, texts = inputs(model)
    found = []
    for mode in ("none", "block"):
        model.zero_grad()
        with recomputed(model, mode):  # type: ignore[arg-type]
            packed_loss(model, schedule, x0, texts, STEPS, noise).mean().backward()
        found.append(gradients(model))
    assert found[0].equal(found[1])


def test_an_epoch_uses_every_sample_once_within_the_budget() -> None:
    lengths = torch.randint(5, 60, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    plan = PackPlan(lengths, 100, seed=3)
    count = len(plan.epoch(0))
    packs = [plan.pack(step) for step in range(count)]
    assert sorted(i for pack in packs for i in pack) == list(range(50))
    assert max(sum(lengths[i] for i in pack) for pack in packs) <= 100
    assert plan.pack(count) == plan.epoch(1)[0]
    assert PackPlan(lengths, 100, seed=3).pack(count + 1) == plan.pack(count + 1)  # as after a resume
    assert PackPlan(lengths, 100, seed=4).epoch(0) != plan.epoch(0)
    assert 100 * count < 50 * max(lengths)  # fewer tokens computed than with a row for each sample


def test_first_fit_goes_to_the_first_pack_with_room() -> None:
    assert first_fit([6, 5, 4, 3], 10, [0, 1, 2, 3]) == [[0, 2], [1, 3]]
    with pytest.raises(SettingError, match="sample 1 has 11 tokens"):
        first_fit([1, 11], 10, [0, 1])
    with pytest.raises(SettingError, match="no samples"):
        PackPlan([], 10)


def test_lengths_count_padding_frames() -> None:
    assert num_tokens((1, 4, 8, 8), 5, (2, 2, 2)) == 5 + 16
    assert num_tokens((3, 4, 8, 8), 5, (1, 2, 2)) == 5 + 48


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(SettingError, match="slices or mask"):
        Pack.of([1], [2], method="flash")  # type: ignore[arg-type]
