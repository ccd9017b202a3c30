"""Arms of the diffusion model: where timesteps are drawn, which tokens attend to each other, which clips
share a step or come first, and whether the noisiest timestep still shows the clip.

Latents come from the shipped VAE and captions from the shipped text encoder, which stays frozen; the expert
transformer is new in every run. The arms of one seed share initial weights, clips, captions and noise.

Legend: B batch, T latent frames, C channels, H/W latent rows/columns, S joint tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from kit import Figures, Outcome, Settings, fit, num_trained
from torch import Tensor

from cogvideox_diff.config import CogVideoXConfig
from cogvideox_diff.formats import load_parts, open_folder
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.schedulers import DDIMScheduler, make_levels
from cogvideox_diff.text_encoder import encode_prompts
from cogvideox_diff.training.data import LatentClips, encode_shapes
from cogvideox_diff.training.objective import diffusion_loss
from cogvideox_diff.training.pack import PackPlan, num_tokens, packed_loss
from cogvideox_diff.training.recipes import TEXT_DROPOUT, unit_scale
from cogvideox_diff.training.timesteps import WHOLE
from cogvideox_diff.transformer import ExpertTransformer
from shared.attention import attend
from shared.clips import shapes
from shared.tokenizers.t5 import T5Tokenizer

EVALUATED = range(50, 1000, 100)  # timesteps of the held-out loss
BINS = {f"{low}..{low + 199}": range(low, low + 200) for low in range(0, 1000, 200)}
AT_REST = 48  # batches whose losses are compared once the weights no longer move
SAMPLING_STEPS = 12
SMALL = 32  # pixels, where the full size is 64
MOTION_FROM = 500  # above it the input shows little of where things are
LENGTHS = (1, 2, 3, 5)  # latent frames of the packed arm's clips: 1, 5, 9, 17 frames
CHUNK = 48


@dataclass(frozen=True, kw_only=True)
class World:
    """The data and what is frozen."""

    settings: Settings
    config: CogVideoXConfig
    clips: LatentClips
    scale: float
    features: dict[str, Tensor]  # of every caption [L, D]
    small: Callable[[], LatentClips]  # the same clips, half as high and wide; encoded when first asked for


def load_world(settings: Settings, folder: Path) -> World:
    """Clips are encoded with the shipped VAE, once per `folder`."""
    model = open_folder("demo")
    parts = load_parts(model, torch.float32)
    encode = partial(
        encode_shapes,
        parts.vae,
        num_clips=settings.num_clips,
        seed=1,
        num_frames=shapes.NUM_FRAMES,
        quiet=True,
    )
    clips = encode(folder / "latents.safetensors")
    texts = ["", *sorted({c.text for c in shapes.captions()})]
    tokenizer = T5Tokenizer(model.tokenizer, text_len=model.config.text.text_len)
    features, _ = encode_prompts(parts.text_encoder, tokenizer, texts)
    sizes = replace(model.config.transformer, num_layers=settings.num_layers, num_heads=settings.num_heads)
    return World(
        settings=settings,
        config=replace(model.config, transformer=sizes),
        clips=clips,
        scale=unit_scale(clips),
        features=dict(zip(texts, features, strict=True)),
        small=cache(partial(encode, folder / f"latents-{SMALL}.safetensors", size=SMALL)),
    )


@dataclass(frozen=True, kw_only=True)
class Arm:
    uniform: bool = True  # Explicit Uniform Sampling
    separated: bool = False  # attention inside a frame and along time in turn
    packed: bool = False  # clips of several lengths, as many as fill the tokens of a step
    zero_snr: bool = True  # the last timestep is noise alone
    progressive: bool = (
        False  # the first half of the steps on small clips, as many as fill the tokens of a step
    )
    joint: bool = False  # a quarter of a step's tokens are stills


ARMS = {
    "full-uniform": Arm(),
    "full-independent": Arm(uniform=False),
    "separated-uniform": Arm(separated=True),
    "packed-uniform": Arm(packed=True),
    "full-some-snr": Arm(zero_snr=False),
    "progressive": Arm(progressive=True),
    "joint": Arm(joint=True),
}


def run_arm(world: World, name: str, seed: int) -> Outcome:
    """Train one arm and measure it."""
    arm, settings = ARMS[name], world.settings
    model = ExpertTransformer(world.config.transformer)
    model.init_weights(torch.Generator().manual_seed(seed), zero_modulation=True)
    if arm.separated:
        separate(model)
    schedule = NoiseSchedule.from_config(replace(world.config.schedule, zero_terminal_snr=arm.zero_snr))
    config = settings.train_config(settings.diffusion_steps, seed, lr=4e-3, muon_lr=2e-2)
    losses, seconds = fit(model, loss_of(world, model, schedule, arm, seed), config)
    at_rest = spread_at_rest(partial(batch_loss, world, model, schedule, arm, seed))
    figures = {"spread": [spread(losses)], "spread at rest": [at_rest]} | generated(world, model, schedule)
    figures |= held_out(world, model, schedule) | by_length(world, model, schedule)
    return Outcome(arm=name, seed=seed, figures=figures, trained=num_trained(model), seconds_per_step=seconds)


def loss_of(
    world: World, model: ExpertTransformer, schedule: NoiseSchedule, arm: Arm, seed: int
) -> Callable[[int], Tensor]:
    """What the arm minimises in a step."""
    plain = partial(batch_loss, world, model, schedule, arm, seed)
    if arm.packed:
        return partial(pack_loss, world, model, schedule, pack_plan(world, seed), seed)
    if arm.joint:
        return partial(joint_loss, plain, world)
    if arm.progressive:
        small = partial(plain, clips=world.small(), size=small_batch(world))
        return lambda step: (small if 2 * step < world.settings.diffusion_steps else plain)(step)
    return plain


def small_batch(world: World) -> int:
    """How many small clips have the tokens of a step."""
    config = world.config.transformer
    latents = (world.clips.latents, world.small().latents)
    whole, small = (num_tokens(x.shape[1:], config.text_len, config.patch_size) for x in latents)
    return world.settings.diffusion_batch * whole // small


def joint_loss(plain: Callable[..., Tensor], world: World, step: int) -> Tensor:
    """As the demo's recipe: the clips' loss and half of the stills', which are clips' first latent frames; as
    many of each as fill a step's tokens."""
    size = round(
        0.75 * world.settings.diffusion_batch
    )  # a still has a third of a clip's tokens, text included
    first = replace(world.clips, latents=world.clips.latents[:, :1])
    return plain(step, size=size) + 0.5 * plain(step, clips=first, size=size, stream=1)


def batch_loss(
    world: World,
    model: ExpertTransformer,
    schedule: NoiseSchedule,
    arm: Arm,
    seed: int,
    step: int,
    *,
    clips: LatentClips | None = None,
    size: int = 0,
    stream: int = 0,
) -> Tensor:
    """Mean loss of `size` clips (0: the settings' number) in a step; everything but the timesteps is the same
    in all arms of a seed that take the same clips."""
    clips, size = clips or world.clips, size or world.settings.diffusion_batch
    rng = np.random.default_rng([seed, step, stream] if stream else [seed, step])
    picks = rng.integers(len(clips) - world.settings.num_held, size=size)
    dropped = rng.random(size) < TEXT_DROPOUT
    captions = ["" if no else clips.captions[i].text for i, no in zip(picks, dropped, strict=True)]
    x0 = clips.latents[torch.from_numpy(picks)].float() * world.scale
    noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
    if arm.uniform:
        steps = WHOLE.spread(size, rng, schedule.num_timesteps)
    else:
        steps = rng.integers(schedule.num_timesteps, size=size)
    text = torch.stack([world.features[caption] for caption in captions])
    return diffusion_loss(model, schedule, x0, text, torch.from_numpy(steps), noise).mean()


# ---- packs


def length_of(clip: int) -> int:
    """Latent frames that the packed arm sees of a clip: the first ones, as the causal VAE encodes them."""
    return LENGTHS[clip % len(LENGTHS)]


def pack_plan(world: World, seed: int) -> PackPlan:
    """Packs of as many tokens as a step of the other arms computes."""
    config = world.config.transformer
    _, *shape = world.clips.latents.shape
    lengths = [
        num_tokens((length_of(i), *shape[1:]), config.text_len, config.patch_size)
        for i in range(len(world.clips) - world.settings.num_held)
    ]
    return PackPlan(lengths, world.settings.diffusion_batch * max(lengths), seed)


def pack_loss(
    world: World, model: ExpertTransformer, schedule: NoiseSchedule, plan: PackPlan, seed: int, step: int
) -> Tensor:
    """Mean loss of the samples of a pack; timesteps are spread over them."""
    rng, picks = np.random.default_rng([seed, step]), plan.pack(step)
    clips = [world.clips.latents[i, : length_of(i)].float() * world.scale for i in picks]
    captions = ["" if rng.random() < TEXT_DROPOUT else world.clips.captions[i].text for i in picks]
    noise = [torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)) for x in clips]
    steps = torch.from_numpy(rng.permutation(WHOLE.spread(len(picks), rng, schedule.num_timesteps)))
    texts = [world.features[caption] for caption in captions]
    return packed_loss(model, schedule, clips, texts, steps, noise).mean()


# ---- separated attention


def separate(model: ExpertTransformer) -> None:
    """Even blocks attend inside a frame, odd ones along time at one place. Text is seen by all and sees all,
    weights and operations stay: only what video tokens see of each other changes."""
    config = model.config
    _, h, w = (size // patch for size, patch in zip(config.sample_size, config.patch_size, strict=True))
    for layer, block in enumerate(model.blocks):
        block.attn.attend = partial(
            attend_apart, places=h * w, text_len=config.text_len, along_time=layer % 2 == 1
        )


def attend_apart(
    q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, *, places: int, text_len: int, along_time: bool
) -> Tensor:
    frames = (q_BNSD.shape[2] - text_len) // places
    return attend(q_BNSD, k_BNSD, v_BNSD, bias=visible((frames, places), text_len, along_time=along_time))


@cache
def visible(grid: tuple[int, int], text_len: int, *, along_time: bool) -> Tensor:
    """Which tokens (rows) see which (columns), bool [S, S]; `grid` is (frames, places)."""
    frames, places = grid
    own = torch.arange(frames * places)
    own = own % places if along_time else own // places
    seen_SS = torch.ones((text_len + len(own),) * 2, dtype=torch.bool)
    seen_SS[text_len:, text_len:] = own[:, None] == own
    return seen_SS


# ---- measures


def spread(losses: list[float]) -> float:
    """Standard deviation of a step's loss around the trend, over the second half of a run, relative to its
    mean; from differences of neighbours (von Neumann 1941), which a slow fall does not touch."""
    late = np.array(losses[len(losses) // 2 :])
    return float(np.sqrt(np.square(np.diff(late)).mean() / 2) / late.mean()) if len(late) > 1 else 0.0


@torch.no_grad()
def spread_at_rest(loss: Callable[[int], Tensor]) -> float:
    """Relative standard deviation of the losses of many batches under weights that no longer move: what the
    draw of the timesteps adds to that of the clips and of the noise."""
    losses = np.array([float(loss(1_000_000 + i)) for i in range(AT_REST)])
    return float(losses.std(ddof=1) / losses.mean())


@torch.no_grad()
def generated(world: World, model: ExpertTransformer, schedule: NoiseSchedule) -> Figures:
    """Videos made from noise for the held-out captions, without guidance: squared error of the background's
    latents, relative to that of always giving the mean background."""
    x0, text, captions = held_clips(world)
    solver = DDIMScheduler(make_levels(schedule, SAMPLING_STEPS, "diffusers"))
    x = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(solver.timesteps):
        clean = solver.to_x0(x, velocities(model, x, text, torch.full((len(x),), t)), i)
        x, _ = solver.step(x, clean, i, None, torch.randn_like)
    made, true = (z.flatten(3).median(-1).values.mean(1) for z in (x, x0))  # [N, C]
    grounds = {c.background for c in captions}
    means = {g: true[[c.background == g for c in captions]].mean(0) for g in grounds}
    wanted = torch.stack([means[c.background] for c in captions])
    guess = (wanted - wanted.mean(0)).square().mean()
    return {"background error": ((made - wanted).square().mean(1) / guess).tolist()}


@torch.no_grad()
def held_out(world: World, model: ExpertTransformer, schedule: NoiseSchedule) -> Figures:
    """Loss of every held-out clip, as a whole and by timestep, and how wrong its motion is: squared error
    of the changes between latent frames of the estimated clean clip, relative to the true changes (clips that
    move, timesteps from 500 on)."""
    x0, text, captions = held_clips(world)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    losses, wrong = {}, torch.zeros(len(x0))
    for t in EVALUATED:
        steps = torch.full((len(x0),), t)
        x_t = schedule.add_noise(x0, noise, steps)
        v = velocities(model, x_t, text, steps)
        losses[t] = (v - schedule.velocity(x0, noise, steps)).square().flatten(1).mean(1)
        if t >= MOTION_FROM:
            error = schedule.x0_from_velocity(x_t, v, steps) - x0
            wrong += error.diff(dim=1).square().flatten(1).mean(1)
    true = x0.diff(dim=1).square().flatten(1).mean(1) * sum(t >= MOTION_FROM for t in EVALUATED)
    moves = torch.tensor([caption.motion != "still" for caption in captions])
    by_bin = {f"loss {name}": torch.stack([losses[t] for t in losses if t in r]) for name, r in BINS.items()}
    figures = {"loss": torch.stack(list(losses.values()))} | by_bin
    return {name: x.mean(0).tolist() for name, x in figures.items()} | {
        "motion error": (wrong / true)[moves].tolist()
    }


@torch.no_grad()
def by_length(world: World, model: ExpertTransformer, schedule: NoiseSchedule) -> Figures:
    """Loss of every held-out clip's first frames, one measure per length."""
    whole, text, _ = held_clips(world)
    figures: Figures = {}
    for length in LENGTHS:
        x0 = whole[:, :length]
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(length))
        losses = []
        for t in EVALUATED[::2]:
            steps = torch.full((len(x0),), t)
            v = velocities(model, schedule.add_noise(x0, noise, steps), text, steps)
            losses.append((v - schedule.velocity(x0, noise, steps)).square().flatten(1).mean(1))
        figures[f"loss frames {length}"] = torch.stack(losses).mean(0).tolist()
    return figures


def held_clips(world: World) -> tuple[Tensor, Tensor, tuple[shapes.Caption, ...]]:
    """Scaled latents [N, T, C, H, W], text features [N, L, D] and captions that no arm is trained on."""
    first = len(world.clips) - world.settings.num_held
    captions = world.clips.captions[first:]
    text = torch.stack([world.features[caption.text] for caption in captions])
    return world.clips.latents[first:].float() * world.scale, text, captions


def velocities(model: ExpertTransformer, x_BTCHW: Tensor, text_BLD: Tensor, steps_B: Tensor) -> Tensor:
    parts = zip(*(x.split(CHUNK) for x in (x_BTCHW, text_BLD, steps_B)), strict=True)
    return torch.cat([model(*part) for part in parts])
