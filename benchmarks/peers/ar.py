"""Rows of the autoregressive family beside the release's own cost structure (`slow_reference`): guided steps
of one and of four samples, and a whole video. Weights are random and the same on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import registry
from benchmarks.peers.harness import Case, Pair, relative_difference, seconds_of
from benchmarks.peers.slow_reference import SlowDecoder, SlowSampler, slow_generate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXT_LEN, STEPS, ALPHA, CLUSTERS = 32, 8, 3.0, 500
SIDE = 20  # tokens along a frame's side
DRAW = {"temperature": 1.05, "top_k": 12, "temperature2": 0.89}


def ours_of(module: str) -> Any:
    return registry.module("cogvideo", module)


def cases() -> list[Case]:
    words = f"{STEPS} guided steps with sampling, 8 layers of 512, 20 x 20 tokens a frame"
    rows = [
        Case(
            name=f"ar/step-{name}{'' if batch == 1 else f'-batch{batch}'}-ctx{TEXT_LEN + slot}",
            words=f"{words}, batch {batch}, behind {slot} slots of the key frames",
            build=partial(step_pair, dtype, batch, slot),
        )
        for batch, slot in ((1, 600), (1, 1400), (4, 1800))
        for name, dtype in DTYPES.items()
    ]
    whole = (
        "33 frames of 20 x 20 tokens: first frame, guided key frames, three guided rounds of interpolation"
    )
    videos = [
        Case(name=f"ar/video-{name}", words=whole, build=partial(video_pair, dtype, SIDE), long=True)
        for name, dtype in DTYPES.items()
    ]
    return [*rows, *videos]


def transformers(dtype: torch.dtype, side: int) -> tuple[Any, Any]:
    """Both stages, 8 layers of 8 heads of 64, with frames of `side` x `side` tokens."""
    config = replace(ours_of("config").cogvideo(), sampling=ours_of("config").SamplingConfig())
    offset = config.keyframes.image_position_offset
    small = replace(
        config.keyframes,
        num_layers=8,
        num_heads=8,
        vocab_size=config.keyframes.num_image_tokens + 200,
        start_of_image=config.keyframes.num_image_tokens + 150,
        grid=(side, side),
        num_positions=offset + side * side,
    )
    stages = (small, replace(small, temporal="window", window=side // 2))
    return tuple(random_model(stage, dtype) for stage in stages)


def random_model(config: Any, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ours_of("transformer").CogVideoTransformer(config)
        for name, parameter in model.named_parameters():
            if name.endswith("mix"):
                parameter.data.normal_()
    return model.eval().requires_grad_(False).to(dtype)


def cluster_labels(num_tokens: int) -> Tensor:
    return torch.randint(CLUSTERS, (num_tokens,), generator=torch.Generator().manual_seed(2))


# ---- steps


def step_pair(dtype: torch.dtype, batch: int, slot: int) -> Pair:
    """`STEPS` tokens behind `slot` slots of stage 1, from the same caches; all of them are fed before."""
    model, _ = transformers(dtype, SIDE)
    config = model.config
    layout = ours_of("layout").keyframe_layout(config, TEXT_LEN)
    random = torch.Generator().manual_seed(1)
    frames = torch.randint(
        config.num_image_tokens, (batch, slot // config.frame_len, config.frame_len), generator=random
    )
    texts = torch.randint(
        config.pad_token, config.start_of_image, (2 * batch, TEXT_LEN), generator=random
    ).tolist()
    given = {"groups": 2, "text_weight": 0.0, "release": False}
    state = ours_of("generation").prefill(model, layout, texts, frames, **given)
    tokens = torch.randint(config.num_image_tokens, (config.frame_len, batch), generator=random)
    while state.next_slot < slot:
        model.step(tokens[state.next_slot % config.frame_len].repeat(2), state)
    facts = {
        "tokens": STEPS * batch,
        "floor_seconds": STEPS * step_bytes(model, layout, 2 * batch, slot) / bandwidth(),
    }
    return guided_pair(model, state, tokens[:STEPS], facts)


def guided_pair(model: Any, state: Any, tokens_SB: Tensor, facts: dict[str, Any]) -> Pair:
    """Steps with guidance and sampling from where `state` stands, fed with these tokens."""
    (_, batch), slot, device = tokens_SB.shape, state.next_slot, tokens_SB.device
    with device:  # where the slow caches are
        slow = [SlowDecoder.behind(model, state, rows) for rows in (slice(batch), slice(batch, None))]
    labels = cluster_labels(model.config.num_image_tokens).to(device)
    guide, sampler = ours_of("sampling").guide, ours_of("sampling").CogLMSampler(labels, **DRAW)
    slow_sampler = SlowSampler(labels, **DRAW)
    random = torch.Generator().manual_seed(3)
    uniforms = torch.rand(*tokens_SB.shape, 2, dtype=torch.float64, generator=random).to(device)

    def run_ours() -> Tensor:
        state.next_slot = slot
        for tokens_B, uniforms_B2 in zip(tokens_SB, uniforms, strict=True):
            logits = model.step(tokens_B.repeat(2), state)
            guided = guide(logits[:batch], logits[batch:], ALPHA)
            sampler.sample(guided, uniforms_B2)
        return guided

    def run_slow() -> Tensor:
        for decoder in slow:
            decoder.rewind(slot)
        for tokens_B in tokens_SB:
            logits, others = (decoder.step(tokens_B) for decoder in slow)
            guided = others + (logits - others) * ALPHA
            slow_sampler(guided)
        return guided

    return Pair(
        ours=torch.inference_mode()(run_ours),
        peer=torch.inference_mode()(run_slow),
        difference=lambda: relative_difference(run_ours(), run_slow()),
        facts=facts,
    )


def step_bytes(model: Any, layout: Any, rows: int, slot: int) -> int:
    """What a step must read: the weights once, and every row's keys and values."""
    return steps_bytes(model, layout, rows, [(divmod(slot, layout.frame_len),)])


def steps_bytes(model: Any, layout: Any, rows: int, waves: Sequence[Any]) -> int:
    """The same of several steps, each with a slot of each of some frames."""
    config, weight = model.config, model.word_embeddings.weight
    weights = weight[: config.num_image_tokens].nbytes + sum(
        p.nbytes
        for name, p in model.blocks.named_parameters()
        if not (layout.base_only and (".temporal." in name or name.endswith("mix")))
    )
    near = {"window": config.window, "extent": config.extent, "like": weight.new_empty(1, 0)}
    context, keys = ours_of("slot_attention").SlotAttention(layout, **near), 0
    for wave in waves:
        context.aim(wave)
        kinds = [held_keys(looks) for looks in context.temporal_looks] or [0]
        temporal = sum(kinds[layer % len(kinds)] for layer in range(config.num_layers))
        keys += config.num_layers * held_keys(context.spatial_looks) + temporal
    return len(waves) * weights + keys * rows * 2 * config.hidden_size * weight.itemsize


def held_keys(looks: Sequence[Any]) -> int:
    """Keys that were there before the step."""
    return sum(look.keys - look.slots for look in looks)


def bandwidth() -> float:
    """Bytes per second of reading memory that no cache holds, by this process's CPU time."""
    data = torch.ones(1 << 26)  # 256 MiB
    return data.nbytes / sorted(seconds_of(data.sum, "cpu").cpu for _ in range(7))[3]


# ---- a video


class Words:
    """A tokenizer of equally long texts."""

    def __init__(self, config: Any) -> None:
        self.first = config.pad_token + 1

    def encode(self, text: str) -> list[int]:
        return [self.first + sum(text.encode()) % 50 + i for i in range(TEXT_LEN // 2)]

    def id_of(self, piece: str) -> int:
        return self.first + 110


def video_pair(dtype: torch.dtype, side: int) -> Pair:
    keyframes, interpolation = transformers(dtype, side)
    config = replace(
        ours_of("config").SamplingConfig(),
        interpolation_guidance_alpha=ALPHA,
        guidance_alpha=ALPHA,
        log_text_attention_weights=0.0,
    )
    labels, words = cluster_labels(keyframes.config.num_image_tokens), Words(keyframes.config)
    samplers = ours_of("generation").build_samplers(config, labels)

    def run_ours() -> Tensor:
        given = (words, ["a"], config, samplers, [torch.Generator().manual_seed(0)])
        frames = ours_of("keyframes").generate_first_frames(keyframes, *given)
        frames = ours_of("keyframes").generate_keyframes(keyframes, *given, given_BGS=frames)
        return ours_of("interpolation").interpolate(interpolation, *given, frames_BMS=frames)

    needed = video_bytes(keyframes, interpolation, len(config.interpolation_durations))
    return Pair(
        ours=run_ours,
        peer=partial(slow_video, keyframes, interpolation, words, config, labels),
        facts={"floor_seconds": needed / bandwidth()},
    )


def video_bytes(keyframes: Any, interpolation: Any, rounds: int) -> int:
    """What the steps of a guided video must read, without its prefills."""
    layouts, schedule = ours_of("layout"), ours_of("wavefront").wavefront_schedule
    first = layouts.image_layout(keyframes.config, TEXT_LEN)
    keys = layouts.keyframe_layout(keyframes.config, TEXT_LEN)
    between = layouts.interpolation_layout(interpolation.config, TEXT_LEN)
    slots = range(first.frame_len)
    one_by_one = [((frame, slot),) for frame in range(1, keys.num_frames) for slot in slots]
    total = steps_bytes(keyframes, first, 1, [((0, slot),) for slot in slots])
    total += steps_bytes(keyframes, keys, 2, one_by_one)
    blocks = (keys.num_frames - 1) // (between.num_given - 1)
    waves = schedule(interpolation.config, between).waves
    return total + sum(steps_bytes(interpolation, between, 2 * blocks << i, waves) for i in range(rounds))


def slow_video(keyframes: Any, interpolation: Any, words: Words, config: Any, labels: Tensor) -> Tensor:
    """The same stages by the release's way; gaps of a round in one batch, as there."""
    layouts, cut = ours_of("layout"), ours_of("interpolation")

    def sampler(draw: Any) -> SlowSampler:
        return SlowSampler(
            labels, temperature=draw.temperature, top_k=draw.top_k, temperature2=draw.temperature2
        )

    prompt = [*words.encode("a"), words.id_of("<n>"), *words.encode("b")]
    first = layouts.image_layout(keyframes.config, len(prompt))
    nothing = torch.empty(1, 0, first.frame_len, dtype=torch.long)
    frames = slow_generate(keyframes, first, [prompt], nothing, sampler(config.first_frame))
    keys = layouts.keyframe_layout(keyframes.config, len(prompt))
    texts, draw = [prompt, prompt], sampler(config.default)
    frames = slow_generate(keyframes, keys, texts, frames, draw, guidance_alpha=ALPHA)
    between = layouts.interpolation_layout(interpolation.config, len(prompt))
    for _ in config.interpolation_durations:
        blocks = cut.cut_blocks(frames, between.num_given)[0]
        done = slow_generate(
            interpolation, between, [prompt] * 2 * len(blocks), blocks, draw, guidance_alpha=ALPHA
        )
        frames = cut.merge_blocks(between.to_display(done)[None])
    return frames
