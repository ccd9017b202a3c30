"""What CogVideo costs, from its configuration alone: operations, bytes and sequential steps of every stage.

Legend: T text, F frames, S slots of a frame, L layers, R rows (samples or blocks, twice under guidance),
P slots of a step, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cogvideo_ar import fast_decode
from cogvideo_ar.attention import layer_kinds
from cogvideo_ar.config import CogVideoConfig, SuperResolutionConfig, TransformerConfig, VQVAEConfig
from cogvideo_ar.layout import (
    SequenceLayout,
    image_layout,
    interpolation_layout,
    keyframe_layout,
    near_frames,
    near_slots,
)
from cogvideo_ar.options import PIXELS_PER_TOKEN, Plan
from cogvideo_ar.super_resolution.direct import CELLS_PER_DRAW
from cogvideo_ar.super_resolution.iterative import cell_levels
from cogvideo_ar.transformer import region_sizes
from cogvideo_ar.vqvae import ATTENTION_LEVEL
from cogvideo_ar.wavefront import wavefront_schedule
from shared.costs import Part, StageCost, attention, convolution, linear, pointwise, repeated
from shared.cpu_attention import COLUMNS, bags_take, num_blocks

CODEC_FRAMES = 16  # that pass the image codec together
CODEC_SIZE = 4  # bytes: the codec is always float32
BLOCK_PASSES = 40  # readings and writings of the rows in a block beside its matrix products
LOCAL_PASSES = 9  # for every entry of a window: a product and a sum with keys, and with values

# Numbers held at once, in widths of a row; found by counting the tensors that are alive (tests hold them).
PREFILL_ROWS = 10  # its sum with the attention, its norm, the MLP's inner rows twice
WINDOW_ROWS = 12  # the folded queries, keys and values of a windowed channel are more than that
STEP_ROWS = 10
DRAW_BYTES = 30  # of a logit while a token is drawn: float32, then float64 scaled, sorted, summed
FINE_ROWS = 16  # local attention computes in float32
CODEC_MAPS = 4  # feature maps alive in a residual block


# ---- weights


def channel_params(width: int) -> int:
    return 4 * width * width + 4 * width


def block_params(config: TransformerConfig | SuperResolutionConfig, *, channels: int, mix: bool) -> int:
    """Two norms before and two behind, the projections of the channels, the MLP."""
    d = config.hidden_size
    return 8 * d + channels * channel_params(d) + mix * d + 8 * d * d + 5 * d


def transformer_params(config: TransformerConfig) -> tuple[int, int]:
    """(all parameters, those of the temporal channel, which a second stage does not share)."""
    d, dual = config.hidden_size, config.temporal != "none"
    base = (config.vocab_size + config.num_positions + 2) * d
    base += config.num_layers * block_params(config, channels=1, mix=False)
    own = config.num_extra_positions * d + config.num_layers * (channel_params(d) + d) if dual else 0
    return base + own, own


def fine_params(config: SuperResolutionConfig) -> int:
    rows = config.vocab_size + config.num_positions + config.fine_len + 2
    channels = 2 if config.kind == "direct" else 1
    block = block_params(config, channels=channels, mix=False)
    return rows * config.hidden_size + config.num_layers * block


def codec_params(config: VQVAEConfig) -> int:
    """Counted on the net without memory; the codec is small."""
    from cogvideo_ar.vqvae import VQVAE

    with torch.device("meta"):
        net = VQVAE(config)
    return sum(x.numel() for x in (*net.parameters(), *net.buffers()))


# ---- caches


def cache_bytes(
    config: TransformerConfig,
    layout: SequenceLayout,
    rows: int,
    size: int,
    lanes: int,
    *,
    columns: bool = False,
) -> int:
    """Keys and values of both channels; `lanes` frames are under way at once. `columns`: keys in whole blocks
    (`kv_cache.ColumnCache`)."""
    spatial = [layout.text_len + layout.frame_len] * lanes * config.num_layers
    kinds = [region_sizes(config, layout, kind) for kind in range(2 if config.window else 1)]
    temporal = [one for layer in range(config.num_layers) for one in kinds[layer % len(kinds)]]
    in_columns = spatial + ([] if any(config.extent) else temporal) if columns else []
    padding = sum(COLUMNS * num_blocks(one) - one for one in in_columns)
    return rows * config.hidden_size * size * (2 * sum(spatial + temporal) + padding)


# ---- prefill and steps


def prefill_parts(
    config: TransformerConfig, layout: SequenceLayout, rows: int, size: int
) -> tuple[Part, ...]:
    """Text and given frames enter the caches; the last block makes keys and values only, in the spatial
    channel those of the text."""
    d, text, given, slots = config.hidden_size, layout.text_len, layout.num_given, layout.frame_len
    length = text + given * slots
    block = [*_linear_block(rows * length, d, size), attention(text, text, d, size, batch=rows)]
    if given:
        block += [attention(slots, text + slots, d, size, batch=rows * given)]
    if not layout.base_only:
        block += [linear(rows * length, d, 3 * d, size), linear(rows * given * slots, d, d, size)]
        block += _given_attention(config, layout, rows, size)
    last = [linear(rows * text, d, 3 * d, size), pointwise(rows * length * d, BLOCK_PASSES / 4, size)]
    if not layout.base_only:
        last.append(linear(rows * length, d, 3 * d, size))
    return (*repeated(block, config.num_layers - 1), *last)


def _given_attention(config: TransformerConfig, layout: SequenceLayout, rows: int, size: int) -> list[Part]:
    """The temporal channel of the given frames: one another fully, or each those before it."""
    d, text, given = config.hidden_size, layout.text_len, layout.num_given
    windows = layout.frame_len // config.window**2 if config.window else 1
    held = layout.frame_len // windows
    if layout.given_bidirectional or not given:
        spans = [(given, given)] if given else []
    else:
        spans = [(1, last) for last in range(1, given + 1)]
    return [
        attention(queries * held, text + last * held, d, size, batch=rows * windows)
        for queries, last in spans
    ]


def _linear_block(rows: int, width: int, size: int) -> list[Part]:
    """What every row passes: the spatial channel, the MLP, the norms."""
    return [
        linear(rows, width, 3 * width, size),
        linear(rows, width, width, size),
        linear(rows, width, 4 * width, size),
        linear(rows, 4 * width, width, size),
        pointwise(rows * width, BLOCK_PASSES, size),
    ]


def decode_parts(
    config: TransformerConfig, layout: SequenceLayout, rows: int, size: int, *, waves: bool
) -> tuple[int, int, tuple[Part, ...]]:
    """(sequential steps, most slots in one, work) of all frames behind the given ones. The weights are read
    once in every step, whatever its rows and slots."""
    d, places = config.hidden_size, layout.num_frames - layout.num_given
    tokens = places * layout.frame_len
    schedule = wavefront_schedule(config, layout) if waves and tokens else None
    steps = schedule.num_steps if schedule else tokens
    channels = 4 if layout.base_only else 8
    weights = config.num_layers * (channels + 8) * d * d + config.num_image_tokens * d
    moved = steps * weights + rows * tokens * config.num_layers * 20 * d
    drawn = rows * tokens * config.num_image_tokens
    parts = [
        Part(kind="matmul", flops=2 * rows * tokens * weights, moved=size * moved),
        _attended(sum(_seen(config, layout)), tokens, rows, d, size),
        pointwise(rows * tokens * d * config.num_layers, BLOCK_PASSES, size),
        pointwise(drawn, DRAW_BYTES / 4, 4),
    ]
    return steps, schedule.max_parallel if schedule else 1, tuple(parts)


def _attended(keys: int, queries: int, rows: int, width: int, size: int) -> Part:
    """One query at a time against `keys` of them in all."""
    return Part(kind="attention", flops=4 * rows * keys * width, moved=2 * size * rows * keys * width)


def _seen(config: TransformerConfig, layout: SequenceLayout) -> Iterator[int]:
    """Keys that all generated slots see together, for every layer and channel."""
    text, slots = layout.text_len, layout.frame_len
    frames = range(layout.num_given, layout.num_frames)
    spatial = sum(range(text + 1, text + slots + 1)) * len(frames)
    kinds = [
        _seen_over_time(config, layout, shifted, frames) for shifted in layer_kinds(layout, config.window)
    ]
    for layer in range(config.num_layers):
        yield spatial
        if kinds:
            yield kinds[layer % len(kinds)]


def _seen_over_time(config: TransformerConfig, layout: SequenceLayout, shifted: bool, frames: range) -> int:
    near_SS = near_slots(layout.grid, config.window, config.extent, shifted=shifted)
    near_FF = near_frames(layout.frame_times, config.extent[0])
    whole, own = int(near_SS.sum()), int(near_SS.tril().sum())
    before = sum(int(near_FF[frame, :frame].sum()) for frame in frames)
    return len(frames) * (layout.text_len * layout.frame_len + own) + before * whole


# ---- stages of tokens


@dataclass(frozen=True, kw_only=True)
class TokenStage:
    """One run of the loop over slots; `runs` of them follow one another."""

    config: TransformerConfig
    layout: SequenceLayout
    rows: int
    waves: bool = False
    runs: int = 1

    def cost(self, size: int, *, columns: bool = False) -> tuple[int, int, int, tuple[Part, ...]]:
        """(sequential steps, bytes of the cache, bytes of the rest at its peak, work)."""
        config, layout, rows = self.config, self.layout, self.rows
        steps, parallel, parts = decode_parts(config, layout, rows, size, waves=self.waves)
        lanes = max(1, layout.num_frames - layout.num_given) if self.waves else 1
        cache = cache_bytes(config, layout, rows, size, lanes, columns=columns)
        work = max(prefill_work(config, layout, rows, size), step_work(config, rows, parallel, size))
        whole = (*prefill_parts(config, layout, rows, size), *parts)
        positions = layout.num_frames * layout.frame_len * config.hidden_size * size
        return self.runs * steps, cache, work + positions, repeated(whole, self.runs)


def prefill_work(config: TransformerConfig, layout: SequenceLayout, rows: int, size: int) -> int:
    """Bytes at the prefill's peak: its rows, and the masks of both channels."""
    text, given, slots = layout.text_len, layout.num_given, layout.frame_len
    rows = min(rows, layout.rows_at_once)
    widths = WINDOW_ROWS if config.window and given else PREFILL_ROWS
    held = rows * (text + given * slots) * config.hidden_size * widths
    windows = slots // config.window**2 if config.window else 1
    reach = given * slots // windows
    kinds = 0 if layout.base_only else 2 if config.window else 1
    masks = given * slots * (text + slots) + kinds * windows * reach * (text + reach)
    return size * (held + rows * masks)


def step_work(config: TransformerConfig, rows: int, parallel: int, size: int) -> int:
    """Bytes at a step's peak: rows of the widest layer, and the draw of one token per row."""
    held = rows * parallel * config.hidden_size * STEP_ROWS * size
    return held + rows * config.num_image_tokens * (parallel * (size + 4) + DRAW_BYTES)


def first_frame_stage(config: TransformerConfig, text_len: int, samples: int) -> TokenStage:
    return TokenStage(config=config, layout=image_layout(config, text_len), rows=samples)


def keyframe_stage(
    config: TransformerConfig, text_len: int, samples: int, *, num_frames: int, guided: bool
) -> TokenStage:
    return TokenStage(
        config=config,
        layout=keyframe_layout(config, text_len, num_frames=num_frames),
        rows=samples * (1 + guided),
        waves=config.temporal != "full",
    )


def interpolation_stages(
    config: TransformerConfig, text_len: int, blocks: int, *, max_batch: int, guided: bool
) -> list[TokenStage]:
    """One round over so many blocks: full batches, then what is left."""
    layout = interpolation_layout(config, text_len)
    batches = [(max_batch, blocks // max_batch), (blocks % max_batch, 1)]
    return [
        TokenStage(config=config, layout=layout, rows=count * (1 + guided), waves=True, runs=runs)
        for count, runs in batches
        if count * runs
    ]


# ---- super-resolution and codec


def fine_parts(config: SuperResolutionConfig, frames: int, size: int) -> tuple[Part, ...]:
    """Large frames: one pass each (direct) or several (iterative), `max_batch` frames at once. The local
    attention makes no matrix product: it is counted by its bytes."""
    d, fine, direct = config.hidden_size, config.fine_len, config.kind == "direct"
    prefix = config.text_len + (config.coarse_len if direct else 0)
    entries = config.fine_kernel[0] * config.fine_kernel[1]
    entries += config.coarse_kernel[0] * config.coarse_kernel[1] if direct else 0
    batches = [min(config.max_batch, frames - start) for start in range(0, frames, config.max_batch)]
    parts: list[Part] = []
    for rows in batches:
        block = [
            *_linear_block(rows * (prefix + fine), d, size),
            attention(prefix, prefix, d, size, batch=rows),
            pointwise(rows * fine * d, LOCAL_PASSES * entries, 4),
        ]
        if not direct:
            block.append(attention(fine, prefix, d, size, batch=rows))
        for cells in _drawn_cells(config):
            parts += repeated(block, config.num_layers)
            parts.append(linear(rows * cells, d, config.num_image_tokens, 4 if direct else size))
            parts.append(pointwise(rows * cells * config.num_image_tokens, DRAW_BYTES / 4, 4))
    return tuple(parts)


def _drawn_cells(config: SuperResolutionConfig) -> list[int]:
    """Cells that are drawn in every pass."""
    if config.kind == "direct":
        return [config.fine_len]
    levels = cell_levels(config.fine_grid)
    return [int((levels > number).sum()) for number in range(len(config.pass_top_k))]


def fine_work(config: SuperResolutionConfig, frames: int, size: int) -> int:
    """Bytes at the peak of a batch: its rows in a block, or the logits of one piece of cells."""
    rows = min(frames, config.max_batch)
    length = config.text_len + config.fine_len + (config.coarse_len if config.kind == "direct" else 0)
    held = rows * length * config.hidden_size * size
    drawn = min(CELLS_PER_DRAW, rows * config.fine_len) * config.num_image_tokens * DRAW_BYTES
    return max(FINE_ROWS * held, held + drawn)


def codec_parts(config: VQVAEConfig, frames: int, grid: tuple[int, int]) -> tuple[Part, ...]:
    """Codes of `frames` frames to pixels, `CODEC_FRAMES` at a time."""
    batches = [min(CODEC_FRAMES, frames - start) for start in range(0, frames, CODEC_FRAMES)]
    return tuple(part for count in batches for part in _codec_decoder(config, count, grid[0] * grid[1]))


def _codec_decoder(config: VQVAEConfig, frames: int, area: int) -> Iterator[Part]:
    multipliers = config.multipliers_of(PIXELS_PER_TOKEN)
    widths = [config.base_channels * m for m in (*multipliers, multipliers[-1])]
    deepest, size = widths[-1], CODEC_SIZE
    yield convolution(frames * area, config.code_dim, deepest, 9, size)
    yield from _codec_block(frames * area, deepest, deepest)
    yield from _codec_attention(frames, area, deepest)
    yield from _codec_block(frames * area, deepest, deepest)
    for level in reversed(range(len(multipliers))):
        for inputs in [widths[level + 1]] + [widths[level]] * (config.decoder_res_blocks - 1):
            yield from _codec_block(frames * area, inputs, widths[level])
            if level == ATTENTION_LEVEL:
                yield from _codec_attention(frames, area, widths[level])
        if level:
            area *= 4
            yield convolution(frames * area, widths[level], widths[level], 9, size)
    yield convolution(frames * area, widths[0], 3, 9, size)


def _codec_block(places: int, inputs: int, outputs: int) -> Iterator[Part]:
    yield convolution(places, inputs, outputs, 9, CODEC_SIZE)
    yield convolution(places, outputs, outputs, 9, CODEC_SIZE)
    yield pointwise(places * (inputs + outputs), 6, CODEC_SIZE)
    if inputs != outputs:
        yield convolution(places, inputs, outputs, 1, CODEC_SIZE)


def _codec_attention(frames: int, area: int, width: int) -> Iterator[Part]:
    for _ in range(4):
        yield convolution(frames * area, width, width, 1, CODEC_SIZE)
    yield attention(area, area, width, CODEC_SIZE, batch=frames)


def codec_work(config: VQVAEConfig, frames: int, grid: tuple[int, int]) -> int:
    """Bytes at the decoder's peak: the maps of a residual block at the full size."""
    multipliers = config.multipliers_of(PIXELS_PER_TOKEN)
    area = grid[0] * grid[1] * PIXELS_PER_TOKEN**2
    at_once = min(frames, CODEC_FRAMES)
    widest = max(multipliers[:2]) * config.base_channels  # the last level's block reads the level before
    return area * CODEC_SIZE * (at_once * widest * CODEC_MAPS + 3 * frames)


# ---- a call


def stage_costs(
    config: CogVideoConfig,
    plan: Plan,
    dtype: torch.dtype,
    *,
    text_len: int | None = None,
    samples: int = 1,
    on_cpu: bool = False,
) -> list[StageCost]:
    """The stages of `plan` for `samples` videos at once, in order. `text_len` counts the tokens of a prompt
    with its template (default: what the model was trained with). On the CPU steps of small nets have copies
    of their weights."""
    size, text = dtype.itemsize, config.keyframes.max_text_len if text_len is None else text_len
    sampling, base = plan.sampling, config.keyframes
    missing = max(0, plan.num_keyframes - 1)
    guided = sampling.guidance_alpha != 1
    runs = {"model/first_frame": [first_frame_stage(base, text, samples)]}
    if missing:
        keys = keyframe_stage(base, text, samples, num_frames=plan.num_keyframes, guided=guided)
        runs["model/keyframes"] = [keys]
    costs = [_token_cost(name, "keyframes", stages, dtype, on_cpu) for name, stages in runs.items()]
    costs += _interpolation_costs(config, plan, text, samples, dtype, on_cpu)
    grid = base.grid
    for name, fine in _fine_stages(config, plan):
        costs.append(_fine_cost(name, fine, plan.num_frames * samples, size))
        grid = fine.fine_grid
    return [*costs, _codec_cost(config.vqvae, plan.num_frames, samples, grid)]


def _interpolation_costs(
    config: CogVideoConfig, plan: Plan, text: int, samples: int, dtype: torch.dtype, on_cpu: bool
) -> list[StageCost]:
    """The rounds one after the other; each has its own batches."""
    step = (config.interpolation.num_frames - 1) // 2
    guided = plan.sampling.interpolation_guidance_alpha != 1
    stages: list[TokenStage] = []
    frames = plan.num_keyframes
    for _ in plan.sampling.interpolation_durations:
        blocks = samples * (frames - 1) // step
        most = plan.sampling.max_batch
        stages += interpolation_stages(config.interpolation, text, blocks, max_batch=most, guided=guided)
        frames = 2 * frames - 1
    name = "interpolation"
    return [_token_cost(f"model/{name}", name, stages, dtype, on_cpu)] if stages else []


def _token_cost(name: str, net: str, stages: list[TokenStage], dtype: torch.dtype, on_cpu: bool) -> StageCost:
    config, size = stages[0].config, dtype.itemsize
    copies = copied_bytes(config, dtype, base_only=stages[0].layout.base_only) if on_cpu else 0
    whole, own = transformer_params(config)
    block = block_params(
        config, channels=1 if config.temporal == "none" else 2, mix=config.temporal != "none"
    )
    columns = copies > 0 and bags_take(dtype)
    costs = (stage.cost(size, columns=columns) for stage in stages)
    steps, caches, works, parts = zip(*costs, strict=True)
    runs = sum(stage.runs for stage in stages)
    return StageCost(
        name=name,
        net=net,
        unit="tokens",
        steps=sum(steps),
        forwards=sum(steps) + runs,
        parts=tuple(part for group in parts for part in group),
        weights=whole * size,
        streamed=(whole - (config.num_layers - 2) * block) * size,
        cache=max(caches),
        work=max(works) + copies,
        shared=(whole - own) * size if net == "interpolation" else 0,
    )


def copied_bytes(config: TransformerConfig, dtype: torch.dtype, *, base_only: bool) -> int:
    """Of the weights that `fast_decode` copies for a generation on the CPU; 0 where it does not."""
    head = config.num_image_tokens * config.hidden_size
    dual = config.temporal != "none"
    whole, used = (
        (config.num_layers * block_params(config, channels=channels, mix=channels > 1) + head)
        * dtype.itemsize
        for channels in (1 + dual, 1 + (dual and not base_only))
    )
    return used if fast_decode.pays(config.hidden_size, whole, dtype) else 0


def _fine_stages(config: CogVideoConfig, plan: Plan) -> Iterator[tuple[str, SuperResolutionConfig]]:
    if plan.fine_draw is not None and config.super_resolution is not None:
        yield "model/super_resolution", config.super_resolution
    if plan.refinement and config.refinement is not None:
        yield "model/refinement", config.refinement


def _fine_cost(name: str, config: SuperResolutionConfig, frames: int, size: int) -> StageCost:
    whole = fine_params(config)
    block = block_params(config, channels=2 if config.kind == "direct" else 1, mix=False)
    passes = -(-frames // config.max_batch) * len(_drawn_cells(config))
    return StageCost(
        name=name,
        net=name.removeprefix("model/"),
        unit="passes",
        steps=passes,
        forwards=passes,
        parts=fine_parts(config, frames, size),
        weights=whole * size,
        streamed=(whole - (config.num_layers - 2) * block) * size,
        work=fine_work(config, frames, size),
    )


def _codec_cost(config: VQVAEConfig, frames: int, samples: int, grid: tuple[int, int]) -> StageCost:
    weights = codec_params(config) * CODEC_SIZE
    batches = samples * -(-frames // CODEC_FRAMES)
    return StageCost(
        name="decode",
        net="vqvae",
        unit="batches",
        steps=batches,
        forwards=batches,
        parts=repeated(codec_parts(config, frames, grid), samples),
        weights=weights,
        streamed=weights,
        work=codec_work(config, frames, grid),
    )
