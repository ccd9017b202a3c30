"""What CogVideoX costs, from its configuration alone: operations and bytes of every stage.

The convolutions are counted as a GPU runs them; on a CPU in float32 some take another path with fewer
operations. Peaks of memory are those of `cogvideox_diff.memory`, which offloading goes by too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from cogvideox_diff.config import CogVideoXConfig, T5Config, TransformerConfig, VAEConfig
from cogvideox_diff.planning import Plan
from cogvideox_diff.vae.causal_conv import chunk_bounds
from cogvideox_diff.vae.tiling import Tiles, decode_tiles, encode_tiles
from shared.costs import Part, StageCost, attention, convolution, linear, pointwise, repeated

BLOCK_PASSES = 45  # readings and writings of the sequence in a block beside its matrix products
T5_PASSES = 20
VAE_PASSES = 10  # of a convolution's input: norm, modulation, SiLU, history, sum


# ---- expert transformer


def transformer_parts(
    config: TransformerConfig, grid: tuple[int, int, int], rows: int, size: int
) -> tuple[Part, ...]:
    """One forward of `rows` samples (two with guidance) of a patch grid (time, rows, columns)."""
    d, e = config.hidden_dim, config.time_embed_dim
    video, patch = math.prod(grid), math.prod(config.patch_size)
    length = config.text_len + video
    ends = [
        linear(rows * video, config.in_channels * patch, d, size),
        linear(rows * config.text_len, config.text_dim, d, size),
        linear(rows, d, e, size),
        linear(rows, e, e, size),
        linear(rows, e, 2 * d, size),
        linear(rows * video, d, config.out_channels * patch, size),
    ]
    if config.ofs_embed_dim:
        ends += [linear(rows, config.ofs_embed_dim, e, size), linear(rows, e, e, size)]
    block = [
        linear(rows, e, 3 * d, size, count=4),  # both norms, video and text
        linear(rows * length, d, d, size, count=4),
        attention(length, length, d, size, batch=rows),
        linear(rows * length, d, config.mlp_ratio * d, size),
        linear(rows * length, config.mlp_ratio * d, d, size),
        pointwise(rows * length * d, BLOCK_PASSES, size),
    ]
    return (*ends, *repeated(block, config.num_layers))


# ---- text encoder


def text_parts(config: T5Config, prompts: int, size: int) -> tuple[Part, ...]:
    rows, inner = prompts * config.text_len, config.num_heads * config.d_kv
    layer = [
        linear(rows, config.d_model, inner, size, count=3),
        linear(rows, inner, config.d_model, size),
        attention(config.text_len, config.text_len, inner, size, batch=prompts),
        linear(rows, config.d_model, config.d_ff, size, count=2),
        linear(rows, config.d_ff, config.d_model, size),
        pointwise(rows * config.d_model, T5_PASSES, size),
    ]
    return repeated(layer, config.num_layers)


# ---- VAE


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of a clip on its way through the VAE."""

    frames: int
    rows: int
    columns: int
    latent_places: int  # of the piece's latents, which condition the decoder's norms
    first: bool
    single_frame: str

    @property
    def places(self) -> int:
        return self.frames * self.rows * self.columns

    @property
    def single(self) -> int:
        """1 where the first frame stands alone, as `ClipContext.has_single_frame` says."""
        if self.single_frame == "odd_count":
            return self.frames % 2
        return int(self.single_frame == "first_piece" and self.first)

    def enlarged(self) -> Piece:
        return replace(self, rows=2 * self.rows, columns=2 * self.columns)

    def reduced(self) -> Piece:
        return replace(self, rows=self.rows // 2, columns=self.columns // 2)


def decode_parts(
    config: VAEConfig, latents: tuple[int, int, int], size: int, *, tiled: bool = False
) -> tuple[Part, ...]:
    """Latents (frames, rows, columns) of one clip to pixels."""
    frames, *sides = latents
    return tuple(
        part
        for height, width in tile_sizes((sides[0], sides[1]), decode_tiles(config) if tiled else None)
        for first, last in chunk_bounds(frames, config.decode_latents)
        for part in _decoder(config, (last - first, height, width), first == 0, size)
    )


def encode_parts(
    config: VAEConfig, pixels: tuple[int, int, int], size: int, *, tiled: bool = False
) -> tuple[Part, ...]:
    """Pixels (frames, rows, columns) of one clip to latents."""
    frames, *sides = pixels
    return tuple(
        part
        for height, width in tile_sizes((sides[0], sides[1]), encode_tiles(config) if tiled else None)
        for first, last in chunk_bounds(frames, config.encode_frames)
        for part in _encoder(config, (last - first, height, width), first == 0, size)
    )


def tile_sizes(sides: tuple[int, int], tiles: Tiles | None) -> list[tuple[int, int]]:
    """(height, width) of every tile that a frame is cut into."""
    if tiles is None or (sides[0] <= tiles.size[0] and sides[1] <= tiles.size[1]):
        return [sides]
    rows, columns = (
        [min(size, side - start) for start in range(0, side, step)]
        for side, size, step in zip(sides, tiles.size, tiles.step, strict=True)
    )
    return [(row, column) for row in rows for column in columns]


def _decoder(config: VAEConfig, shape: tuple[int, int, int], first: bool, size: int) -> Iterator[Part]:
    """Of one piece of latents (frames, rows, columns)."""
    widths, (frames, rows, columns) = config.widths[::-1], shape
    piece = Piece(
        frames=frames,
        rows=rows,
        columns=columns,
        latent_places=math.prod(shape),
        first=first,
        single_frame=config.single_frame,
    )
    yield _causal_conv(piece, config.latent_channels, widths[0], size)
    for _ in range(2):
        yield from _res_block(piece, widths[0], widths[0], config.latent_channels, size)
    for level, width in enumerate(widths):
        for inputs in [widths[max(level - 1, 0)]] + [width] * config.blocks_per_level:
            yield from _res_block(piece, inputs, width, config.latent_channels, size)
        if level < len(widths) - 1:
            piece = piece.enlarged()
            yield convolution(piece.places, width, width, 9, size)
            if level < config.temporal_levels:
                piece = replace(piece, frames=2 * piece.frames - piece.single)
    yield from _spatial_norm(piece, widths[-1], config.latent_channels, size)
    yield _causal_conv(piece, widths[-1], 3, size)


def _encoder(config: VAEConfig, shape: tuple[int, int, int], first: bool, size: int) -> Iterator[Part]:
    """Of one piece of pixels (frames, rows, columns)."""
    widths, (frames, rows, columns) = config.widths, shape
    piece = Piece(
        frames=frames, rows=rows, columns=columns, latent_places=0, first=first, single_frame="first_piece"
    )
    yield _causal_conv(piece, 3, widths[0], size)
    for level, width in enumerate(widths):
        for inputs in [widths[max(level - 1, 0)]] + [width] * (config.blocks_per_level - 1):
            yield from _res_block(piece, inputs, width, 0, size)
        if level < len(widths) - 1:
            if level < config.temporal_levels:
                piece = replace(piece, frames=(piece.frames - piece.single) // 2 + piece.single)
            piece = piece.reduced()
            yield convolution(piece.places, width, width, 9, size)
    for _ in range(2):
        yield from _res_block(piece, widths[-1], widths[-1], 0, size)
    yield _causal_conv(piece, widths[-1], 2 * config.latent_channels, size)


def _causal_conv(piece: Piece, inputs: int, outputs: int, size: int) -> Part:
    return convolution(piece.places, inputs, outputs, 27, size)


def _res_block(piece: Piece, inputs: int, outputs: int, latent: int, size: int) -> Iterator[Part]:
    for channels in (inputs, outputs):
        if latent:
            yield from _spatial_norm(piece, channels, latent, size)
        yield pointwise(piece.places * channels, VAE_PASSES, size)
        yield _causal_conv(piece, channels, outputs, size)
    if inputs != outputs:
        yield linear(piece.places, inputs, outputs, size)


def _spatial_norm(piece: Piece, channels: int, latent: int, size: int) -> Iterator[Part]:
    """The two maps of the latents, taken at the latents' own size."""
    yield linear(piece.latent_places, latent, channels, size, count=2)


# ---- a call


def stage_costs(
    config: CogVideoXConfig,
    plan: Plan,
    dtype: torch.dtype,
    *,
    tiled: bool = False,
    quantize: str = "none",
    batch: int = 1,
) -> list[StageCost]:
    """The stages of `plan` for `batch` videos of different prompts at once, in order."""
    from cogvideox_diff.memory import stage_needs

    needs = stage_needs(config, plan, dtype, tiled=tiled, quantize=quantize, batch=batch)  # type: ignore[arg-type]
    work = _stage_parts(config, plan, dtype.itemsize, tiled, batch)
    costs = []
    for need in needs:
        unit, steps, forwards, parts = work[need.stage]
        costs.append(
            StageCost(
                name=need.stage,
                net=need.net,
                unit=unit,
                steps=steps,
                forwards=forwards,
                parts=parts,
                weights=need.weights,
                streamed=need.streamed,
                work=need.work,
            )
        )
    return costs


def _stage_parts(
    config: CogVideoXConfig, plan: Plan, size: int, tiled: bool, batch: int
) -> dict[str, tuple[str, int, int, tuple[Part, ...]]]:
    """(unit, sequential steps, runs of the net, work) of every stage."""
    geometry, rows = plan.geometry, 2 if plan.guided else 1
    encodes_negative = plan.guided and (plan.sampling.unconditional != "zeros" or plan.negative_prompt)
    prompts = batch + bool(encodes_negative)
    step = transformer_parts(config.transformer, geometry.grid, rows * batch, size)
    latents = (geometry.latent_frames, *geometry.latent_size)
    pieces = len(chunk_bounds(latents[0], config.vae.decode_latents))
    stages = {
        "text": ("prompts", 1, 1, text_parts(config.text, prompts, size)),
        "model": ("steps", plan.num_steps, plan.num_steps, repeated(step, plan.num_steps)),
        "decode": (
            "pieces",
            pieces,
            pieces * len(tile_sizes(geometry.latent_size, decode_tiles(config.vae) if tiled else None)),
            repeated(decode_parts(config.vae, latents, size, tiled=tiled), batch),
        ),
    }
    if plan.task != "t2v":
        frames = 1 if plan.task == "i2v" else geometry.num_frames
        read = repeated(encode_parts(config.vae, (frames, *geometry.size), size, tiled=tiled), batch)
        count = len(chunk_bounds(frames, config.vae.encode_frames))
        stages["encode"] = ("pieces", count, count, read)
    return stages
