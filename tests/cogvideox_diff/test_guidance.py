"""Guidance weights and the predictor that binds a model's conditions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cogvideox_diff.config import SamplingConfig
from cogvideox_diff.guidance import ClassifierFreeGuidance, DynamicGuidance, Predictor, make_guidance
from cogvideox_diff.schedule import NoiseSchedule, ScheduleConfig
from cogvideox_diff.schedulers import make_levels


def test_formula() -> None:
    with_prompt, without = torch.randn(2, 3), torch.randn(2, 3)
    guided = ClassifierFreeGuidance(scale=4.0)(lambda x, t: (with_prompt, without), torch.zeros(2, 3), 10, 0)
    torch.testing.assert_close(guided, without + 4 * (with_prompt - without))
    plain = ClassifierFreeGuidance(scale=4.0)(lambda x, t: (with_prompt, None), torch.zeros(2, 3), 10, 0)
    assert torch.equal(plain, with_prompt)


def test_guidance_is_computed_in_float32() -> None:
    pair = torch.full((2,), 1.0, dtype=torch.bfloat16), torch.full((2,), 0.99, dtype=torch.bfloat16)
    guided = ClassifierFreeGuidance()(lambda x, t: pair, torch.zeros(2), 10, 0)
    assert guided.dtype == torch.float32


def test_quirk_dynamic_cfg_timestep_units() -> None:
    """The released weights at 50 steps jump about; the last ones follow the intended curve mirrored."""
    guide = DynamicGuidance(scale=6.0, num_steps=50)
    timesteps = make_levels(NoiseSchedule.from_config(ScheduleConfig()), 50, "diffusers").timesteps
    weights = [guide.weight(t, i) for i, t in enumerate(timesteps)]
    assert weights[:6] == pytest.approx([2.291, 2.544, 6.974, 6.42, 2.788, 4.272], abs=1e-3)
    assert weights[-5:] == pytest.approx([6.864, 1.064, 1.0, 1.0, 1.123], abs=1e-3)
    assert sum(weights) / 50 == pytest.approx(3.8, abs=0.05)


def test_rise_and_fall_are_monotone_and_mirrored() -> None:
    rise, fall = (DynamicGuidance(scale=6.0, num_steps=20, mode=mode) for mode in ("rise", "fall"))
    up = [rise.weight(0, i) for i in range(20)]
    down = [fall.weight(0, i) for i in range(20)]
    assert up == sorted(up)
    assert down == up[::-1]
    assert up[0] == pytest.approx(1, abs=1e-6)
    assert up[-1] == pytest.approx(7)


def test_make_guidance() -> None:
    assert make_guidance(SamplingConfig(guidance_scale=3.0), 50) == ClassifierFreeGuidance(scale=3.0)
    dynamic = make_guidance(SamplingConfig(dynamic_cfg="rise"), 40)
    assert dynamic == DynamicGuidance(scale=6.0, num_steps=40, mode="rise")
    with pytest.raises(ValueError, match="unknown mode 'up'"):
        DynamicGuidance(num_steps=5, mode="up")  # type: ignore[arg-type]


@pytest.mark.parametrize("batched", [True, False])
def test_predictor(batched: bool) -> None:
    """Each half gets its own text and the same image latents; `ofs` and the timestep reach the model."""
    x, image = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    text, negative = torch.randn(2, 5, 6), torch.randn(2, 5, 6)

    def model(latents: Tensor, texts: Tensor, timesteps: Tensor, ofs: Tensor) -> Tensor:
        assert torch.equal(latents[:2, :, 4:], image)
        value = texts.mean(dim=(1, 2)) * timesteps + ofs
        return latents[:, :, :4] * value.view(-1, 1, 1, 1, 1)

    predict = Predictor(
        model=model, text=text, negative=negative, image_latents=image, ofs=2.0, batched=batched
    )
    got, got_without = predict(x, 7)
    for result, given in ((got, text), (got_without, negative)):
        wanted = x * (given.mean(dim=(1, 2)) * 7 + 2).view(-1, 1, 1, 1, 1)
        torch.testing.assert_close(result, wanted)


def test_predictor_casts_to_the_dtype_of_the_text() -> None:
    predict = Predictor(model=lambda x, *_: x, text=torch.zeros(1, 2, 3, dtype=torch.bfloat16))
    got, without = predict(torch.randn(1, 1, 1, 2, 2), 5)
    assert got.dtype == torch.bfloat16
    assert without is None
