"""The loop: callbacks, a late start, seeds that do not depend on the batch, and NaN reports."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cogvideox_diff.config import SamplingConfig, ScheduleConfig, TransformerConfig
from cogvideox_diff.denoising import Step, denoise
from cogvideox_diff.guidance import ClassifierFreeGuidance, Predictor
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.schedulers import Scheduler, draw_from, draw_noise, make_scheduler
from cogvideox_diff.transformer import ExpertTransformer
from shared.errors import OutputCheckError

SCHEDULE = NoiseSchedule.from_config(ScheduleConfig())


def scheduler_of(name: str, num_steps: int = 5) -> Scheduler:
    return make_scheduler(SCHEDULE, SamplingConfig(num_inference_steps=num_steps, scheduler=name))  # type: ignore[arg-type]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def toy_predict(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
    return torch.sin(x + t / 1000), torch.cos(x)


def run(scheduler: Scheduler, x: Tensor, draws: list[torch.Generator], **options: object) -> Tensor:
    return denoise(toy_predict, scheduler, x, ClassifierFreeGuidance(scale=2.0), draw_from(draws), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    shape = (2, 3, 4, 4)
    both = run(scheduler_of(name), draw_noise(shape, generators(1, 2)), generators(11, 12))
    second = run(scheduler_of(name), draw_noise(shape, generators(2)), generators(12))
    assert torch.equal(both[1:], second)


def test_callback_sees_every_step() -> None:
    steps: list[Step] = []
    final = run(scheduler_of("ddim"), torch.randn(1, 1, 2, 2, 2), generators(0), callback=steps.append)
    assert (steps[0].done, steps[0].total, steps[0].timestep) == (1, 5, 999)
    assert [step.timestep for step in steps] == list(scheduler_of("ddim").timesteps)
    assert torch.equal(steps[-1].x, final)
    torch.testing.assert_close(steps[-1].x0, final)  # the last step ends at its estimate


@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_late_start_equals_the_tail(name: str) -> None:
    """DDIM: stopping after two steps and starting there again changes nothing; both count their own steps."""
    scheduler, x = scheduler_of(name), torch.randn(1, 1, 2, 2, 2)
    steps: list[Step] = []
    whole = run(scheduler, x, generators(0), callback=steps.append)
    late: list[Step] = []
    tail = run(scheduler, steps[1].x, generators(0), start=2, callback=late.append)
    assert (late[-1].done, late[-1].total) == (3, 3)
    assert [step.timestep for step in late] == [step.timestep for step in steps[2:]]
    if name == "ddim":
        assert torch.equal(tail, whole)


def test_the_sample_keeps_its_dtype() -> None:
    x = torch.randn(1, 1, 2, 2, 2).bfloat16()
    assert run(scheduler_of("dpm"), x, generators(0)).dtype == torch.bfloat16


def tiny_model() -> ExpertTransformer:
    config = TransformerConfig(
        num_layers=2, num_heads=1, head_dim=16, in_channels=2, out_channels=2, time_embed_dim=8, text_dim=4
    )
    model = ExpertTransformer(config)
    model.init_weights(torch.Generator().manual_seed(0), zero_modulation=False)
    return model


def test_nan_names_the_first_bad_layer() -> None:
    model = tiny_model()
    nn.init.constant_(model.blocks[1].mlp.fc1.bias, float("inf"))
    predict = Predictor(model=model, text=torch.zeros(1, 3, 4))
    with pytest.raises(
        OutputCheckError, match=r"step 1 \(timestep 999\); first bad layer: blocks\.1\.mlp\.fc1$"
    ):
        denoise(
            predict,
            scheduler_of("ddim"),
            torch.randn(1, 1, 2, 4, 4),
            ClassifierFreeGuidance(),
            draw_from(generators(0)),
            module=model,
        )
    assert not any(part._forward_hooks for part in model.modules())


def test_nan_from_the_sampler_is_named_apart() -> None:
    with pytest.raises(OutputCheckError, match="from the sampler at step 1"):
        denoise(
            lambda x, t: (torch.zeros_like(x), None),
            scheduler_of("dpm"),
            torch.zeros(1, 1, 1, 2, 2),
            ClassifierFreeGuidance(),
            lambda like: torch.full_like(like, float("nan")),
        )
