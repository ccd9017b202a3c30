"""Arms of the autoregressive model: at which frame rates it learns and whether the text tells them, what
learns above the image model, and how far the temporal channel sees.

Tokens come from the shipped image codec. One small image model (the base channel) is trained on single
frames; every arm starts from it and learns key frames. The arms of one seed see the same clips in the same
order as far as their frame rates allow.

Legend: B batch, F frames, S tokens of a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kit import Figures, Outcome, Settings, fit, num_trained
from torch import Tensor

from cogvideo_ar.config import CogVideoConfig, TransformerConfig
from cogvideo_ar.generation import build_samplers
from cogvideo_ar.keyframes import generate_keyframes
from cogvideo_ar.layout import (
    TrainingBatch,
    image_layout,
    keyframe_layout,
    pad_text,
    prompt_tokens,
    training_batch,
)
from cogvideo_ar.parts import DEMO, Parts, load_parts
from cogvideo_ar.training.data import (
    Sample,
    TokenClips,
    duration_text,
    keyframe_sample,
    sample_at,
    tokenize_shapes,
)
from cogvideo_ar.training.objective import token_losses
from cogvideo_ar.training.recipes import TEXT_DROPOUT, stage_loss
from cogvideo_ar.transformer import CogVideoTransformer, DualChannelAttention
from shared.checkpoints import load_into, load_tensors, save_tensors
from shared.clips import shapes
from shared.runtime import generator
from shared.video import Video

FIXED = 2  # the one stride of "one rate": the middle one
STRIDES = (1, 2, 3, 4)  # measured; 3 is in no arm's training
SAMPLED = (4,)  # strides at which motion is generated
TEMPORAL_ONLY = -30.0  # the mix whose sigmoid leaves nothing of the spatial channel
CHUNK = 24


@dataclass(frozen=True, kw_only=True)
class World:
    """The data, the shipped codec and vocabulary, and the image model of all arms."""

    settings: Settings
    config: TransformerConfig
    model: CogVideoConfig
    parts: Parts
    clips: TokenClips
    base: dict[str, Tensor]
    told: bool = True  # the text begins with the sample's own frame rate, else always with the middle one's


def load_world(settings: Settings, folder: Path) -> World:
    """Clips are tokenised and the image model is trained once per `folder`."""
    parts = load_parts(DEMO, torch.float32, torch.device("cpu"))
    clips = tokenize_shapes(
        parts.vqvae,
        folder / "tokens.safetensors",
        num_clips=settings.num_clips,
        seed=1,
        num_frames=shapes.NUM_FRAMES,
        quiet=True,
    )
    config = replace(parts.config.keyframes, num_layers=settings.num_layers, num_heads=settings.num_heads)
    world = World(settings=settings, config=config, model=parts.config, parts=parts, clips=clips, base={})
    name = f"base-{settings.num_layers}x{settings.num_heads}-{settings.base_steps}x{settings.base_batch}"
    path = folder / f"{name}-{settings.num_clips}.safetensors"
    if not path.exists():
        save_tensors(train_base(world), path)
    return replace(world, base=load_tensors(path))


def train_base(world: World) -> dict[str, Tensor]:
    """The base channel on single frames with their clip's caption, as CogView2 before CogVideo."""
    torch.manual_seed(0)
    model, settings = CogVideoTransformer(world.config), world.settings
    for _, parameter in model.temporal_parameters():
        parameter.requires_grad = False

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([0, step])
        picks = rng.integers(len(world.clips) - settings.num_held, size=settings.base_batch)
        times = rng.integers(world.clips.tokens.shape[1], size=len(picks))
        frames = world.clips.tokens[torch.from_numpy(picks), torch.from_numpy(times)]
        texts = [said(world.clips.captions[i], rng) for i in picks]
        return stage_loss(model, image_batch(world, texts, frames[:, None]))[0]

    fit(model, loss, settings.train_config(settings.base_steps, 0, lr=1.5e-3, muon_lr=3e-3))
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


@dataclass(frozen=True, kw_only=True)
class Arm:
    rates: bool = True  # hierarchical frame rates
    dual: bool = True  # a temporal channel beside the base channel
    frozen: bool = True  # the base channel does not learn (where there are two)
    told: bool = True  # the frame rate is told
    channel: Mapping[str, Any] = field(default_factory=dict)  # of the temporal channel, if not "full"


ARMS = {
    "dual-rates": Arm(),
    "dual-one-rate": Arm(rates=False),
    "single-rates": Arm(dual=False),
    "dual-all": Arm(frozen=False),
    "dual-untold": Arm(told=False),
    "dual-window": Arm(channel={"temporal": "window", "window": 4}),
    "dual-local": Arm(channel={"temporal": "local", "extent": (5, 2, 2)}),
}


def run_arm(world: World, name: str, seed: int) -> Outcome:
    """Train one arm and measure it."""
    arm, settings = ARMS[name], world.settings
    world = replace(world, told=arm.told, config=replace(world.config, **arm.channel))
    torch.manual_seed(seed)
    model = CogVideoTransformer(world.config)
    load_into(model, world.base)
    model.init_temporal_from_base()
    if not arm.dual:
        merge_channels(model)
    for _, parameter in model.base_parameters() if arm.dual and arm.frozen else ():
        parameter.requires_grad = False

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 1, step])
        train_clips = first_clips(world.clips, len(world.clips) - settings.num_held)
        take = keyframe_sample if arm.rates else one_rate_sample
        samples = [take(train_clips, rng, world.config.num_frames) for _ in range(settings.ar_batch)]
        texts = [said(sample.caption, rng) for sample in samples]
        return stage_loss(model, clip_batch(world, texts, samples))[0]

    config = settings.train_config(settings.ar_steps, seed, lr=4e-3, muon_lr=1e-2)
    _, seconds_per_step = fit(model, loss, config)
    figures = held_out(world, model) | sampled(world, model, seed)
    return Outcome(
        arm=name, seed=seed, figures=figures, trained=num_trained(model), seconds_per_step=seconds_per_step
    )


def merge_channels(model: CogVideoTransformer) -> None:
    """One channel instead of two: the base's own projections attend over all frames, and everything but the
    mix, which is pinned to that channel, goes on learning."""
    for module in model.modules():
        if isinstance(module, DualChannelAttention):
            module.temporal = module.spatial
            module.mix.data.fill_(TEMPORAL_ONLY)
            module.mix.requires_grad = False


# ---- batches


def first_clips(clips: TokenClips, num: int) -> TokenClips:
    return TokenClips(tokens=clips.tokens[:num], captions=clips.captions[:num])


def one_rate_sample(clips: TokenClips, rng: np.random.Generator, num_frames: int) -> Sample:
    """Any clip from any moment on, always at the same rate."""
    index = int(rng.integers(len(clips)))
    return sample_at(clips, index, FIXED, num_frames, rng)


def said(caption: shapes.Caption, rng: np.random.Generator) -> str:
    return "" if rng.random() < TEXT_DROPOUT else caption.text


def image_batch(world: World, texts: Sequence[str], frames_BFS: Tensor) -> TrainingBatch:
    template, tokenizer = world.model.sampling.prompts.first_frame, world.parts.tokenizer
    ids = [prompt_tokens(template, tokenizer, prompt=text) for text in texts]
    return batch(world, ids, frames_BFS, image=True)


def clip_batch(world: World, texts: Sequence[str], samples: Sequence[Sample]) -> TrainingBatch:
    """The text begins with the time that the sample's frames span."""
    template, tokenizer = world.model.sampling.prompts.keyframes, world.parts.tokenizer
    ids = [
        prompt_tokens(template, tokenizer, prompt=text, duration=seconds(world, sample.stride))
        for text, sample in zip(texts, samples, strict=True)
    ]
    return batch(world, ids, torch.stack([sample.frames for sample in samples]), image=False)


def seconds(world: World, stride: int) -> float:
    """What the text says; an arm that is not told says the same of every clip."""
    stride = stride if world.told else FIXED
    return float(duration_text(stride, world.config.num_frames, shapes.FPS))


def batch(world: World, ids: list[list[int]], frames_BFS: Tensor, *, image: bool) -> TrainingBatch:
    text, valid = pad_text(ids, world.config.pad_token, world.config.max_text_len)
    layout = (image_layout if image else keyframe_layout)(world.config, text.shape[1])
    start = world.config.start_of_image
    return training_batch(layout, text, frames_BFS, start_of_image=start, text_valid_BT=valid)


# ---- measures


@torch.no_grad()
def held_out(world: World, model: CogVideoTransformer) -> Figures:
    """Nats per token of every held-out clip at every stride, and of its first frame as an image."""
    clips, num = world.clips, world.settings.num_held
    rows = range(len(clips) - num, len(clips))
    texts = [clips.captions[i].text for i in rows]
    figures: Figures = {}
    for stride in STRIDES:
        rng = np.random.default_rng([3, stride])
        samples = [sample_at(clips, i, stride, world.config.num_frames, rng) for i in rows]
        make = partial(clip_batch, world)
        figures[f"loss stride {stride}"] = row_losses(model, make, texts, samples)
    frames = [clips.tokens[i, :1] for i in rows]
    figures["image loss"] = row_losses(
        model, lambda some, x: image_batch(world, some, torch.stack(list(x))), texts, frames
    )
    figures["loss"] = np.mean([figures[f"loss stride {s}"] for s in (1, 2, 4)], axis=0).tolist()
    return figures


def row_losses(model: CogVideoTransformer, make, texts: list[str], items: list) -> list[float]:
    """Mean loss of the targets of every row."""
    found: list[float] = []
    for i in range(0, len(texts), CHUNK):
        made: TrainingBatch = make(texts[i : i + CHUNK], items[i : i + CHUNK])
        losses = token_losses(model(made.tokens, made.layout, text_valid_BT=made.text_valid), made.labels)
        found += ((losses * made.loss_mask).sum((1, 2)) / made.loss_mask.sum((1, 2))).tolist()
    return found


def sampled(world: World, model: CogVideoTransformer, seed: int) -> Figures:
    """Key frames after a true first frame of moving shapes, read by the oracle: are motion and speed those
    that the prompt and the asked frame rate ask for?"""
    rng = np.random.default_rng([5])
    wanted = [c for c in shapes.prompts("train", 2 * world.settings.num_prompts) if c.speed]
    wanted = wanted[: world.settings.num_prompts]
    scenes = [shapes.draw_scene(rng, caption=caption) for caption in wanted]
    pixels = torch.stack([shapes.render(scene, num_frames=1).to_pixels()[:, 0] for scene in scenes])
    given_BFS = world.parts.vqvae.encode(pixels).flatten(1)[:, None]
    figures: Figures = {}
    for stride in SAMPLED:
        videos = continued(world, model, given_BFS, [c.text for c in wanted], stride, seed)
        read = [shapes.read(video) for video in videos]
        figures[f"motion and speed right, stride {stride}"] = [
            float(r.motion == c.motion and r.speed == c.speed) for r, c in zip(read, wanted, strict=True)
        ]
    return figures


@torch.no_grad()
def continued(
    world: World, model: CogVideoTransformer, given_BFS: Tensor, texts: list[str], stride: int, seed: int
) -> list[Video]:
    """Key frames at a stride behind the given frame; their rate is such that the oracle sees true seconds."""
    settings = replace(world.model.sampling, keyframe_duration=seconds(world, stride), guidance_alpha=1.0)
    streams = [generator(seed, i, "keyframes") for i in range(len(texts))]
    tokens_BFS = generate_keyframes(
        model, world.parts.tokenizer, texts, settings, build_samplers(settings, None), streams, given_BFS
    )
    codes = tokens_BFS.unflatten(2, world.config.grid)
    pixels = [
        world.parts.vqvae.decode(clip).transpose(0, 1) for clip in codes
    ]  # [T, C, H, W] -> [C, T, H, W]
    return [Video.from_pixels(clip, shapes.FPS / stride) for clip in pixels]
