"""examples/ablations: arms differ in what they say and in nothing else, figures become honest intervals, and
the whole runs, tiny."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from cogvideo_ar.config import cogvideo_demo
from cogvideo_ar.layout import keyframe_layout
from cogvideo_ar.transformer import CogVideoTransformer, DualChannelAttention
from cogvideox_diff.config import cogvideox_demo
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.transformer import ExpertTransformer

FOLDER = Path(__file__).parents[2] / "examples" / "ablations"
NAMES = ("kit", "diffusion", "autoregressive", "summary", "run")


@pytest.fixture(scope="module")
def code() -> Iterator[SimpleNamespace]:
    """The example's modules, as its own folder sees them."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


def tiny(code: SimpleNamespace):
    return code.kit.Settings(
        num_clips=10, num_held=4, num_prompts=2, num_layers=2, num_heads=2, diffusion_steps=2,
        diffusion_batch=2, base_steps=2, base_batch=2, ar_steps=2, ar_batch=2,
    )  # fmt: skip


def test_everything_runs_and_is_not_repeated(code: SimpleNamespace, tmp_path: Path):
    said: list[str] = []
    arguments = (code.summary.COMPARISONS.values(), 1, tmp_path, tiny(code))
    content = code.run.run(*arguments, said.append)
    assert len(said) == len(code.run.ARMS) == 14 and set(content["comparisons"]) == set(
        code.summary.COMPARISONS
    )
    for result in content["comparisons"].values():
        for m in result["measures"]:
            assert m["seeds"] == 1 and m["over_seeds"] is None and m["verdict"] == "open"
            assert m["difference"] == pytest.approx(m["idea"] - m["without"], abs=1e-6)
    page = tmp_path / "page.md"
    (tmp_path / "images").mkdir()
    page.write_text(f"What was found.\n{code.summary.MARKER}\nold tables")
    code.summary.write_page(page, content)
    tables = code.summary.markdown(content)
    assert page.read_text() == f"What was found.\n{code.summary.MARKER}\n\n{tables}"
    assert (tmp_path / "images" / "ablations.png").stat().st_size
    files = [tmp_path / f"ablations.{kind}" for kind in ("json", "md", "png")]
    assert all(file.stat().st_size for file in files)
    known = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert code.run.run(*arguments) == content
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == known


def test_other_settings_are_run_again(code: SimpleNamespace, tmp_path: Path):
    outcome = code.kit.Outcome(arm="a", seed=0, figures={"loss": [1.0]}, trained=1, seconds_per_step=0.0)
    calls: list[int] = []

    def measure():
        calls.append(1)
        return outcome

    settings = tiny(code)
    for used in (settings, settings, replace(settings, ar_steps=3)):
        assert code.kit.run_once("a", 0, used, tmp_path, measure).figures == {"loss": [1.0]}
    assert len(calls) == 2
    for needed, runs in (({"loss"}, 2), ({"loss", "another"}, 3)):  # a measure that came later
        code.kit.run_once("a", 0, replace(settings, ar_steps=3), tmp_path, measure, needed=needed)
        assert len(calls) == runs


# ---- arms


def seen_by_frame_0(model: ExpertTransformer, layer: int) -> set[int]:
    """Frames whose change reaches the first place of frame 0 in one layer's attention."""
    t, h, w = 5, 4, 4
    x = torch.randn(1, model.config.text_len + t * h * w, model.config.hidden_dim)
    first, attention = model.config.text_len, model.blocks[layer].attn
    before, reached = attention(x, None)[0, first], set()
    for frame in range(t):
        other = x.clone()
        other[:, first + frame * h * w] += 1  # the same place in that frame
        if not torch.allclose(attention(other, None)[0, first], before, atol=1e-6):
            reached.add(frame)
    return reached


@torch.no_grad()
def test_separated_attention_sees_a_frame_or_a_place(code: SimpleNamespace):
    torch.manual_seed(0)
    model = ExpertTransformer(replace(cogvideox_demo().transformer, num_layers=2, num_heads=2))
    model.init_weights(torch.Generator().manual_seed(0), zero_modulation=True)
    assert seen_by_frame_0(model, 0) == seen_by_frame_0(model, 1) == {0, 1, 2, 3, 4}
    code.diffusion.separate(model)
    assert (seen_by_frame_0(model, 0), seen_by_frame_0(model, 1)) == ({0}, {0, 1, 2, 3, 4})
    space, time = (code.diffusion.visible((3, 2), 1, along_time=b) for b in (False, True))
    assert space[0].all() and space[:, 0].all() and time[0].all() and time[:, 0].all()  # the text
    assert (space[1:, 1:] & time[1:, 1:]).equal(torch.eye(6, dtype=torch.bool))
    assert space[1:, 1:].sum() == 6 * 2 and time[1:, 1:].sum() == 6 * 3


def test_arms_of_a_seed_differ_in_timesteps_alone(code: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    captions = tuple(code.diffusion.shapes.prompts("train", 6))
    world = SimpleNamespace(
        settings=replace(tiny(code), diffusion_batch=8),
        clips=code.diffusion.LatentClips(latents=torch.randn(6, 5, 16, 8, 8), captions=captions),
        features={c.text: torch.randn(16, 4) for c in captions} | {"": torch.zeros(16, 4)},
        scale=1.0,
    )
    seen: list[tuple] = []

    def loss(model, schedule, x0, text, steps, noise):
        seen.append((x0, text, noise, steps))
        return torch.zeros(len(x0))

    monkeypatch.setattr(code.diffusion, "diffusion_loss", loss)
    schedule = NoiseSchedule.from_config(cogvideox_demo().schedule)
    for arm in (code.diffusion.Arm(), code.diffusion.Arm(uniform=False)):
        code.diffusion.batch_loss(world, None, schedule, arm, 3, 7)
    uniform, independent = seen
    assert all(torch.equal(a, b) for a, b in zip(uniform[:3], independent[:3], strict=True))
    assert (uniform[3] // 125).tolist() == [*range(8)] != (independent[3].sort().values // 125).tolist()


def test_small_clips_and_stills_fill_the_tokens_of_a_step(
    code: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    captions = tuple(code.diffusion.shapes.prompts("train", 6))
    whole, small = (
        code.diffusion.LatentClips(latents=torch.randn(6, 5, 16, side, side), captions=captions)
        for side in (8, 4)
    )
    world = SimpleNamespace(
        settings=replace(tiny(code), diffusion_batch=16, diffusion_steps=4, num_held=2),
        config=cogvideox_demo(),
        clips=whole,
        small=lambda: small,
        features={c.text: torch.zeros(16, 4) for c in captions} | {"": torch.zeros(16, 4)},
        scale=1.0,
    )
    seen: list[tuple[int, ...]] = []

    def loss(model, schedule, x0, *more):
        seen.append((len(x0), x0.shape[1], x0.shape[-1]))
        return torch.zeros(len(x0))

    monkeypatch.setattr(code.diffusion, "diffusion_loss", loss)
    schedule = NoiseSchedule.from_config(cogvideox_demo().schedule)
    for arm in ("progressive", "joint"):
        step_of = code.diffusion.loss_of(world, None, schedule, code.diffusion.ARMS[arm], 0)
        for step in range(4):
            step_of(step)
    tokens = 16 * (16 + 5 * 16)  # text, and five frames of 4 x 4 patches
    assert seen[:4] == [(tokens // (16 + 5 * 4), 5, 4)] * 2 + [(16, 5, 8)] * 2
    assert seen[4:] == [(12, 5, 8), (12, 1, 8)] * 4 and 12 * (16 + 5 * 16) + 12 * (16 + 16) == tokens


def test_an_arm_that_is_not_told_reads_one_text_for_all_rates(code: SimpleNamespace):
    world = SimpleNamespace(told=True, config=cogvideo_demo().keyframes)
    said = [code.autoregressive.seconds(world, stride) for stride in (1, 2, 4)]
    assert said == [0.5, 1.0, 2.0]
    world.told = False
    assert [code.autoregressive.seconds(world, stride) for stride in (1, 2, 4)] == [1.0] * 3


def test_packs_fill_the_tokens_of_a_step_with_clips_of_all_lengths(code: SimpleNamespace):
    settings = replace(tiny(code), num_held=4, diffusion_batch=4)
    world = SimpleNamespace(
        settings=settings,
        config=cogvideox_demo(),
        clips=code.diffusion.LatentClips(latents=torch.zeros(44, 5, 16, 8, 8), captions=(None,) * 44),
    )
    plan = code.diffusion.pack_plan(world, 0)
    assert plan.budget == 4 * (16 + 5 * 16) and len(plan.lengths) == 40
    first = plan.pack(0)
    assert {code.diffusion.length_of(i) for i in range(40)} == {1, 2, 3, 5}
    used = sum(16 + 16 * code.diffusion.length_of(i) for i in first)
    assert len(first) > 4 and 0.9 * plan.budget < used <= plan.budget


@torch.no_grad()
def test_merged_channels_are_the_temporal_one_alone(code: SimpleNamespace):
    """With the base's weights in both channels and nothing of the spatial one mixed in."""
    torch.manual_seed(0)
    config = replace(cogvideo_demo().keyframes, num_layers=2, num_heads=2)
    model, other = CogVideoTransformer(config), CogVideoTransformer(config)
    other.load_state_dict(model.state_dict())
    for net in (model, other):
        net.init_temporal_from_base(copy_out=True)
    for module in other.modules():
        if isinstance(module, DualChannelAttention):
            module.mix.fill_(-50.0)
    code.autoregressive.merge_channels(model)
    layout = keyframe_layout(config, 4)
    tokens = torch.randint(0, 512, (2, layout.length))
    assert torch.allclose(model(tokens, layout), other(tokens, layout), atol=1e-6)
    assert code.kit.num_trained(model) < code.kit.num_trained(other)  # the channel counts once


def test_rates_of_the_arms(code: SimpleNamespace):
    captions = tuple(code.autoregressive.shapes.prompts("train", 2))
    tokens = torch.arange(17)[None, :, None].expand(2, 17, 64)
    clips = code.autoregressive.TokenClips(tokens=tokens, captions=captions)
    rng = np.random.default_rng(0)
    for take, strides in (
        (code.autoregressive.keyframe_sample, {1, 2, 4}),
        (code.autoregressive.one_rate_sample, {2}),
        (partial(code.autoregressive.sample_at, clips, 0, 3), {3}),
    ):
        made = [take(5, rng) if isinstance(take, partial) else take(clips, rng, 5) for _ in range(40)]
        assert {sample.stride for sample in made} == strides
        assert all(torch.all(s.frames[:, 0].diff() == s.stride) for s in made)


# ---- figures


def test_spread_is_that_around_the_trend(code: SimpleNamespace):
    noise = np.random.default_rng(0).standard_normal(4000)
    losses = (np.linspace(3, 1, 8000) + np.tile(noise, 2) * 0.1).tolist()
    late = np.array(losses[4000:])
    assert code.diffusion.spread(losses) == pytest.approx(0.1 * noise.std() / late.mean(), rel=0.05)
    assert late.std() > 1.5 * 0.1  # the fall alone would count as much


def outcomes(code: SimpleNamespace, values: list[list[float]]) -> list:
    return [
        code.kit.Outcome(arm="a", seed=i, figures={"loss": v}, trained=1, seconds_per_step=0.1)
        for i, v in enumerate(values)
    ]


def test_differences_are_paired_and_careful(code: SimpleNamespace):
    base = np.random.default_rng(0).normal(1, 0.5, (3, 20))
    loss: ModuleType = code.summary.LOSS
    compare = partial(code.summary.difference, loss, without=outcomes(code, base.tolist()))
    clear = compare(outcomes(code, (base - 0.1 - 0.001 * np.arange(3)[:, None]).tolist()))
    assert clear["verdict"] == "better" and clear["difference"] == pytest.approx(-0.101)
    # 4.303 standard errors of three runs
    half = 4.303 * 0.001 / 3**0.5
    assert clear["over_seeds"] == pytest.approx([-0.101 - half, -0.101 + half], abs=1e-6)
    one_seed_turns = np.array([[-0.1], [-0.1], [0.05]])
    assert compare(outcomes(code, (base + one_seed_turns).tolist()))["verdict"] == "open"
    few_clips_carry = np.zeros(20)
    few_clips_carry[0] = -2.0
    assert compare(outcomes(code, (base + few_clips_carry).tolist()))["verdict"] == "open"
    assert compare(outcomes(code, (base + 0.1).tolist()))["verdict"] == "worse"


def test_a_higher_share_is_better(code: SimpleNamespace):
    share = replace(code.summary.LOSS, sign=1)
    high, low = (outcomes(code, np.full((3, 8), x).tolist()) for x in (0.9, 0.2))
    found = code.summary.difference(share, high, low)
    assert (found["verdict"], found["better"]) == ("better", "more")
