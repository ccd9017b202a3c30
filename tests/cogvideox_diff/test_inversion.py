"""DDIM inversion: exact where the step's equation is solved, better with more steps where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.config import SamplingConfig, ScheduleConfig
from cogvideox_diff.inversion import Inverted, decoded, edit, invert, reconstruct, sharing_attention
from cogvideox_diff.planning import CallSettings, Plan, plan_inversion
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.schedulers import DDIMScheduler, make_levels
from cogvideox_diff.transformer import Attention
from shared.attention import attend
from shared.errors import SettingError
from tests.cogvideox_diff.tiny_pipeline import PROMPT, clip, make, tiny_config, write_tokenizer


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pipe(spiece: Path) -> CogVideoXPipeline:
    """Its v is small beside the noise, as a trained model's changes little within a step."""
    pipe = make("5b", spiece)
    pipe.parts.transformer.proj_out.weight.mul_(0.3)
    return pipe


def found(pipe: CogVideoXPipeline, steps: int, iterations: int) -> tuple[Plan, Inverted]:
    plan = plan_inversion(pipe.config, CallSettings(num_inference_steps=steps), clip())
    return plan, invert(pipe.engine, plan, PROMPT, clip(), iterations=iterations)


def error(pipe: CogVideoXPipeline, steps: int, iterations: int) -> float:
    """Of the reconstructed latents, relative to the clip's."""
    plan, inverted = found(pipe, steps, iterations)
    again = reconstruct(pipe.engine, plan, PROMPT, inverted)
    return float((again - inverted.clean).norm() / inverted.clean.norm())


@pytest.mark.parametrize("rules", ["diffusers", "sat"])
def test_a_step_and_its_inverse(rules: str) -> None:
    """In float64 and for every level, given the model's v at the sample."""
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    solver = DDIMScheduler(make_levels(schedule, 7, rules))  # type: ignore[arg-type]
    x, v = torch.randn(2, 5), torch.randn(2, 5)
    for i in range(7):
        after, _ = solver.step(x, solver.to_x0(x, v, i), i, None, torch.randn_like)
        torch.testing.assert_close(solver.unstep(after, v, i), x, atol=2e-5, rtol=1e-4)
    single = DDIMScheduler(make_levels(schedule, 1, "diffusers"))
    with pytest.raises(ValueError, match="single step"):
        single.unstep(x, v, 0)


def test_solving_the_step_makes_the_inverse_exact(pipe: CogVideoXPipeline) -> None:
    """More evaluations per step come nearer; enough of them reach rounding, at few steps."""
    errors = [error(pipe, 6, iterations) for iterations in (1, 3, 40)]
    assert errors[0] > 3 * errors[1] > 30 * errors[2], errors
    assert errors[2] < 2e-5, errors


def test_the_usual_inversion_gets_better_with_steps(pipe: CogVideoXPipeline) -> None:
    errors = [error(pipe, steps, 1) for steps in (4, 16, 64)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors


def test_what_is_found(pipe: CogVideoXPipeline) -> None:
    plan, inverted = found(pipe, 4, 3)
    assert plan.task == "t2v" and plan.sampling.scheduler == "ddim" and not plan.guided
    assert list(inverted.trajectory) == [249, 499, 749, 999]
    assert torch.equal(inverted.trajectory[999], inverted.noise)
    assert inverted.noise.dtype == torch.float32 and inverted.noise.shape == (1, 3, 4, 4, 6)
    assert torch.equal(inverted.video.frames, clip().frames)
    again = pipe(PROMPT, latents=inverted.noise, num_inference_steps=4, guidance_scale=1.0, scheduler="ddim")
    own = decoded(pipe.engine, plan, reconstruct(pipe.engine, plan, PROMPT, inverted))
    assert int((again.frames.int() - own.frames.int()).abs().max()) <= 1, "a plain call goes on from it"


@pytest.mark.parametrize("variant", ["1.5-5b", "1.5-5b-i2v"])
def test_padded_pairs_and_images(variant: str, spiece: Path) -> None:
    """Noise of the padded length; an image model is given the first frame."""
    pipe = make(variant, spiece)
    pipe.parts.transformer.proj_out.weight.mul_(0.1)
    plan = plan_inversion(pipe.config, CallSettings(num_inference_steps=4), clip())
    inverted = invert(pipe.engine, plan, PROMPT, clip(), iterations=30)
    assert inverted.noise.shape[1] == 4
    again = reconstruct(pipe.engine, plan, PROMPT, inverted)
    assert float((again - inverted.clean).norm() / inverted.clean.norm()) < 1e-4


# ---- edits


def first_attention(pipe: CogVideoXPipeline) -> Attention:
    return next(module for module in pipe.parts.transformer.modules() if isinstance(module, Attention))


def test_an_edit_with_the_same_prompt_is_led_by_the_clip(pipe: CogVideoXPipeline) -> None:
    plan, inverted = found(pipe, 4, 20)
    own = reconstruct(pipe.engine, plan, PROMPT, inverted)
    same = edit(pipe.engine, plan, PROMPT, PROMPT, inverted)
    torch.testing.assert_close(same, own, atol=1e-4, rtol=1e-3)  # it attends to a copy of itself
    other = edit(pipe.engine, plan, PROMPT, "two green stars move up slowly", inverted)
    assert float((other - own).abs().max()) > 1e-3
    plain = reconstruct(pipe.engine, plan, "two green stars move up slowly", inverted)
    assert float((other - plain).abs().max()) > 1e-3
    layer = first_attention(pipe)
    assert layer.attend is attend, "restored"


def test_guided_edits_run(pipe: CogVideoXPipeline) -> None:
    call = CallSettings(num_inference_steps=4, guidance_scale=5.0)
    _, inverted = found(pipe, 4, 2)
    guided = edit(pipe.engine, plan_inversion(pipe.config, call, clip()), PROMPT, "noise", inverted)
    assert guided.shape == inverted.clean.shape


def test_shared_attention_is_over_both(pipe: CogVideoXPipeline) -> None:
    q, k, v = (torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    layer = first_attention(pipe)
    with sharing_attention(pipe.parts.transformer):
        got = layer.attend(q, k, v)

    def joined(x: Tensor, row: int) -> Tensor:
        return torch.cat([x[row : row + 1], x[2:]], dim=2)

    for row in (0, 1):
        torch.testing.assert_close(got[row], attend(q[row : row + 1], joined(k, row), joined(v, row))[0])
    torch.testing.assert_close(got[2], attend(q[2:], k[2:], v[2:])[0])


# ---- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (CallSettings(scheduler="dpm"), "legal: ddim"),
        (CallSettings(strength=0.5), "no strength"),
        (CallSettings(num_inference_steps=1), "at least 2, got 1"),
        (CallSettings(num_frames=10), "10 exceeds the given video's 9 frames; nearest: 9"),
        (CallSettings(height=40), "got 40; nearest: 48"),
    ],
)
def test_refusals(call: CallSettings, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        plan_inversion(tiny_config("5b"), call, clip())
    assert SamplingConfig().scheduler == "ddim"
