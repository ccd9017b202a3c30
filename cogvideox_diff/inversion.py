"""DDIM inversion: the noise from which a given video is sampled, its reconstruction, and edits of it.

A DDIM step is x' = p x + q v(x, t); it is inverted by solving for x. With v taken at x' instead of x that is
the usual inversion, whose error falls with the number of steps; repeating with the x just found (a fixed
point) makes the inverse exact, whatever the number of steps. Editing follows upstream's
`inference/ddim_inversion.py`: attention also sees the keys and values of the inverted video at the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cogvideox_diff import conditioning
from cogvideox_diff.denoising import denoise
from cogvideox_diff.generation import NOTHING, Callback, Engine, Item
from cogvideox_diff.guidance import Predictor, make_guidance
from cogvideox_diff.planning import Plan
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.schedulers import DDIMScheduler, draw_from, make_levels
from cogvideox_diff.transformer import Attend, Attention, ExpertTransformer
from shared.video import Video

ITERATIONS = 5
CLOSE_ENOUGH = 1e-6  # of a fixed point's change, relative


@dataclass(frozen=True, kw_only=True)
class Inverted:
    """What an inversion found: the noise [1, T, C, H, W] in float32 with padding, the sample that every step
    starts from by its timestep, the clean latents, the fitted video, and the worst step's last relative
    change (0: every step's inverse is exact)."""

    noise: Tensor
    trajectory: Mapping[int, Tensor]
    clean: Tensor
    video: Video
    residual: float


def invert(
    engine: Engine,
    plan: Plan,
    prompt: str,
    video: Video,
    *,
    iterations: int = ITERATIONS,
    callback: Callable[[int, int], None] | None = None,
) -> Inverted:
    """The noise that DDIM takes to `video` by `plan`, of `planning.plan_inversion`. `iterations` bounds the
    evaluations of a step; 1 is the usual inversion. `callback(done, total)` is called after every step."""
    given = Video.from_pixels(conditioning.video_pixels(video, plan.geometry), video.fps)
    clean = _clean_latents(engine, given, plan)
    predict, solver = _predictor(engine, plan, prompt, given), _solver(engine, plan)
    guide = make_guidance(plan.sampling, plan.num_steps)
    x, trajectory, worst = clean, {}, 0.0
    steps = list(enumerate(solver.timesteps))
    with torch.no_grad(), engine.placement.computing(engine.parts.transformer):
        for done, (i, timestep) in enumerate(reversed(steps), start=1):
            x_next, change = x, float("inf")
            for _ in range(iterations):
                last, x = x, solver.unstep(x_next, guide(predict, x, timestep, i), i)
                change = float((x - last).norm() / x.norm())
                if change < CLOSE_ENOUGH:
                    break
            worst, trajectory[timestep] = max(worst, change), x
            if callback is not None:
                callback(done, len(steps))
    return Inverted(noise=x, trajectory=trajectory, clean=clean, video=given, residual=worst)


def reconstruct(
    engine: Engine, plan: Plan, prompt: str, found: Inverted, *, callback: Callback | None = None
) -> Tensor:
    """Sample from the inverted noise as it was inverted: latents [1, T, C, H, W], padding included."""
    return _sample(engine, plan, _predictor(engine, plan, prompt, found.video), found.noise, callback)


def edit(
    engine: Engine,
    plan: Plan,
    prompt: str,
    edit_prompt: str,
    found: Inverted,
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Sample from the inverted noise with another prompt, where attention also sees the video of `prompt`."""
    predict = _predictor(engine, plan, edit_prompt, found.video)
    source = _predictor(engine, plan, prompt, found.video)
    values = {name: getattr(predict, name) for name in ("model", "text", "negative", "image_latents", "ofs")}
    led = LedPredictor(**values, source_text=source.text, trajectory=found.trajectory)
    with sharing_attention(engine.parts.transformer):
        return _sample(engine, plan, led, found.noise, callback)


def decoded(engine: Engine, plan: Plan, latents: Tensor) -> Video:
    """The video of padded latents [1, T, C, H, W]."""
    own = conditioning.drop_padding(latents, plan.geometry).to(engine.device, engine.dtype)
    with engine.placement.computing(engine.parts.vae):
        return Video.from_pixels(conditioning.decode(engine.parts.vae, own, tiled=engine.tiled)[0], plan.fps)


# ---- attention that sees the inverted video


@dataclass(frozen=True, kw_only=True)
class LedPredictor(Predictor):
    """Runs the source video of the same step behind the batch, for `sharing_attention`."""

    source_text: Tensor  # [1, L, D]
    trajectory: Mapping[int, Tensor]  # timestep -> [1, T, C, H, W]

    def _run(self, x_BTCHW: Tensor, text: Tensor, timestep: int) -> Tensor:
        source = self.trajectory[timestep].to(x_BTCHW)
        if self.image_latents is not None:
            source = torch.cat([source, self.image_latents[:1].to(source)], dim=2)
        joined = torch.cat([x_BTCHW, source])
        return super()._run(joined, torch.cat([text, self.source_text.to(text)]), timestep)[:-1]


@contextmanager
def sharing_attention(transformer: ExpertTransformer) -> Iterator[None]:
    """In the block the last row of a batch is a source: the others attend to it besides themselves, it does
    to itself alone. Each keeps its own positions."""
    layers = [module for module in transformer.modules() if isinstance(module, Attention)]
    own = [layer.attend for layer in layers]
    try:
        for layer in layers:
            layer.attend = _shared(layer.attend)
        yield
    finally:
        for layer, attend in zip(layers, own, strict=True):
            layer.attend = attend


def _shared(attend: Attend) -> Attend:
    def run(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
        k_both, v_both = (torch.cat([x[:-1], x[-1:].expand_as(x[:-1])], dim=2) for x in (k_BNSD, v_BNSD))
        led = attend(q_BNSD[:-1], k_both, v_both)
        return torch.cat([led, attend(q_BNSD[-1:], k_BNSD[-1:], v_BNSD[-1:])])

    return run


# ---- parts


def _solver(engine: Engine, plan: Plan) -> DDIMScheduler:
    schedule = NoiseSchedule.from_config(engine.config.schedule)
    return DDIMScheduler(make_levels(schedule, plan.sampling.num_inference_steps, plan.sampling.rules))


def _sample(
    engine: Engine, plan: Plan, predict: Predictor, noise: Tensor, callback: Callback | None
) -> Tensor:
    guide, draw = make_guidance(plan.sampling, plan.num_steps), draw_from([])  # DDIM draws nothing
    with engine.placement.computing(engine.parts.transformer):
        return denoise(predict, _solver(engine, plan), noise, guide, draw, callback=callback)


def _clean_latents(engine: Engine, video: Video, plan: Plan) -> Tensor:
    """The posterior's mode, scaled and padded [1, T, C, H, W], in float32."""
    size = plan.geometry
    pixels = video.to_pixels()[None].to(engine.device, engine.dtype)
    shape = (1, size.latent_frames, engine.config.vae.latent_channels, *size.latent_size)
    with engine.placement.computing(engine.parts.vae):
        z = conditioning.encode(engine.parts.vae, pixels, torch.zeros(shape), tiled=engine.tiled)
    return conditioning.clean_latents(z.float(), engine.config, size.padding)


def _predictor(engine: Engine, plan: Plan, prompt: str, video: Video) -> Predictor:
    item, encoded = Item(prompt=prompt), None
    if plan.task == "i2v":
        encoded, _ = engine._encode([replace(item, image=video.frames[0])], plan)
    text, negative, _ = engine._text([item], plan, NOTHING)
    return engine.predictor(plan, text, negative, encoded)
