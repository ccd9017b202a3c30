"""What a model takes of a device's memory, known before weights are read, and the savers that make it fit.

Weights are counted from the configuration; what the nets compute is counted by running them on the meta
device, one layer of a kind, with the video's real sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from cogvideox_diff.config import CogVideoXConfig, T5Config, TransformerConfig, VAEConfig
from cogvideox_diff.guidance import Predictor
from cogvideox_diff.planning import Plan, check_request, tasks_of
from cogvideox_diff.text_encoder import T5TextEncoder
from cogvideox_diff.transformer import ExpertTransformer
from cogvideox_diff.vae.autoencoder import CausalVAE
from cogvideox_diff.vae.tiling import decode_tiles, encode_tiles
from shared.errors import OutOfMemoryError, SettingError
from shared.memory import free_bytes, in_words, peak_bytes
from shared.model_folder import without_memory
from shared.offload import OffloadMode, Weights, blocks_of, check_offload
from shared.quantize import QuantizeMode, check_quantize, quantize, quantized_bytes

if TYPE_CHECKING:
    from cogvideox_diff.formats import Parts

RESERVE = 2**30  # the device's own libraries, and workspaces inside of operators
MARGIN = 1.1  # of what is computed: allocators round up and fall to pieces
OFFLOADS: tuple[OffloadMode, ...] = ("none", "model", "sequential")  # the quickest first
Tiling = Literal["off", "on", "auto"]


@dataclass(frozen=True, kw_only=True)
class StageNeed:
    """Bytes of one stage: its net's weights, those that are there with "sequential", and what it computes."""

    stage: str
    net: str
    weights: int
    streamed: int
    work: int

    def total(self, mode: OffloadMode, all_weights: int) -> int:
        weights = {"none": all_weights, "model": self.weights, "sequential": self.streamed}[mode]
        return weights + int(self.work * MARGIN) + RESERVE


@dataclass(frozen=True, kw_only=True)
class Savers:
    """How memory is saved in one run. `tiled` and pieces other than the model's own change frames a little;
    the offload modes change nothing but time."""

    offload: OffloadMode = "none"
    tiled: bool = False
    encode_frames: int | None = None  # None: the model's own
    decode_latents: int | None = None
    quantize: QuantizeMode = "none"
    reason: str = ""

    def effects(self) -> dict[str, Any]:
        """Those that change the frames, as JSON values."""
        pieces = {"encode_frames": self.encode_frames, "decode_latents": self.decode_latents}
        changed = {name: n for name, n in pieces.items() if n is not None}
        quantize = {} if self.quantize == "none" else {"quantize": self.quantize}
        return {"tiling": self.tiled} | changed | quantize

    def __str__(self) -> str:
        tiles = "tiles" if self.tiled else "no tiles"
        return f"offload {self.offload}, {tiles}" + (f" ({self.reason})" if self.reason else "")

    def vae(self, config: VAEConfig) -> VAEConfig:
        pieces = {"encode_frames": self.encode_frames, "decode_latents": self.decode_latents}
        return replace(config, **{name: n for name, n in pieces.items() if n is not None})


def stage_needs(
    config: CogVideoXConfig,
    plan: Plan,
    dtype: torch.dtype,
    *,
    tiled: bool = False,
    quantize: QuantizeMode = "none",
    batch: int = 1,
) -> list[StageNeed]:
    """The stages of `plan` for `batch` videos at once, in order."""
    work = {"text": ("text_encoder", _text_work(config.text, dtype))}
    video = 2 * _video_bytes(plan, dtype, batch)  # the pieces and what they are put together to
    if plan.task != "t2v":
        frames = 1 if plan.task == "i2v" else plan.geometry.num_frames
        work["encode"] = "vae", _encode_work(config.vae, plan.geometry.size, frames, dtype, tiled) + video
    rows, tokens = batch * (2 if plan.guided else 1), plan.geometry.num_tokens
    kept = plan.approximation.kept_bytes(config.transformer, tokens, rows, dtype.itemsize)
    work["model"] = "transformer", _model_work(config.transformer, plan, dtype, batch) + kept
    latents = plan.geometry.latent_frames
    work["decode"] = "vae", _decode_work(config.vae, plan.geometry.size, latents, dtype, tiled) + video
    sizes = net_bytes(config, dtype, quantize)
    return [
        StageNeed(stage=stage, net=net, weights=sizes[net][0], streamed=sizes[net][1], work=count)
        for stage, (net, count) in work.items()
    ]


def choose_savers(
    config: CogVideoXConfig,
    plan: Plan,
    dtype: torch.dtype,
    *,
    free: int,
    offload: str = "auto",
    tiling: Tiling = "off",
    chunk: Literal["own", "auto"] = "own",
    quantize: QuantizeMode = "none",
) -> Savers:
    """The savers with the least cost that fit into `free` bytes, choosing only where "auto" is given. What is
    exact is tried before what changes frames: offload, then tiles, then smaller pieces.

    OutOfMemoryError where nothing fits, naming the stage, what it needs and what there is."""
    best: tuple[int, StageNeed] | None = None
    modes: list[OffloadMode] = [mode for mode in OFFLOADS if offload in (mode, "auto")]
    tiles = (False, True) if tiling == "auto" else (tiling == "on",)
    for pieces, tiled in product(_pieces(config.vae, chunk), tiles):
        tried = replace(config, vae=pieces.vae(config.vae))
        needs = stage_needs(tried, plan, dtype, tiled=tiled, quantize=quantize)
        whole = sum({need.net: need.weights for need in needs}.values())
        for mode in modes:
            worst = max(needs, key=partial(StageNeed.total, mode=mode, all_weights=whole))
            most = worst.total(mode, whole)
            if most <= free:
                reason = f"{worst.stage} needs {in_words(most)} of {in_words(free)}"
                return replace(pieces, offload=mode, tiled=tiled, quantize=quantize, reason=reason)
            if best is None or most < best[0]:
                best = most, worst
    assert best is not None
    raise OutOfMemoryError(
        f"{best[1].stage} needs about {in_words(best[0])}, the device has {in_words(free)} free; try "
        + ", ".join(
            advice(best[1].stage, offload="sequential", tiled=all(tiles), dtype=dtype, quantize=quantize)
        )
    )


def resolve_savers(
    config: CogVideoXConfig,
    device: torch.device,
    dtype: torch.dtype,
    plan: Plan | None = None,
    *,
    offload: str = "none",
    tiled: bool | Literal["auto"] = False,
    vae_chunk: str = "own",
    quantize: QuantizeMode = "none",
) -> Savers:
    """What "auto" comes to on `device` for `plan` (None: a call that sets nothing); without any "auto" what
    is given. SettingError for unknown names, OutOfMemoryError where nothing fits."""
    check_offload(offload)
    check_quantize(quantize)
    if vae_chunk not in ("own", "auto"):
        raise SettingError(f"unknown vae_chunk {vae_chunk!r}; legal: own, auto")
    reason = ""
    if device.type == "cpu" and offload != "none":
        offload, reason = "none", "the CPU computes where weights wait"
    free = free_bytes(device)
    if free is None or "auto" not in (offload, tiled, vae_chunk):
        known = cast("OffloadMode", "none" if offload == "auto" else offload)
        return Savers(offload=known, tiled=tiled is True, quantize=quantize, reason=reason)
    return choose_savers(
        config,
        native_plan(config) if plan is None else plan,
        dtype,
        free=free,
        offload=offload,
        tiling="auto" if tiled == "auto" else "on" if tiled else "off",
        chunk="auto" if vae_chunk == "auto" else "own",
        quantize=quantize,
    )


def native_plan(config: CogVideoXConfig) -> Plan:
    """A call that sets nothing."""
    size = config.geometry
    needs_image = tasks_of(config) == {"i2v"}
    image = torch.zeros(size.height, size.width, 3, dtype=torch.uint8) if needs_image else None
    return check_request(config, image=image)


def quantized(parts: Parts, mode: QuantizeMode) -> Parts:
    """The transformer's and the text encoder's blocks in 8 bits, in place; the VAE is small."""
    quantize(parts.transformer, mode)
    quantize(parts.text_encoder, mode)
    return parts


def advice(
    stage: str,
    *,
    offload: str = "none",
    tiled: bool = False,
    dtype: torch.dtype,
    quantize: str = "none",
    on_cpu: bool = False,
) -> list[str]:
    """The flags that are left to try when `stage` does not fit, the cheapest first."""
    modes = list(OFFLOADS[OFFLOADS.index(offload) + 1 :]) if offload in OFFLOADS and not on_cpu else []  # type: ignore[arg-type]
    coding = stage in ("encode", "decode")
    return [
        *(["--tiling on"] if coding and not tiled else []),
        *(f"--offload {mode}" for mode in modes if stage != "loading"),
        *(["--dtype bfloat16"] if dtype == torch.float32 else []),
        *(["--quantize int8"] if quantize == "none" and not coding else []),
        *(["--vae_chunk auto"] if coding and tiled else []),
        *(["a smaller model"] if stage == "loading" else ["fewer frames", "a smaller height and width"]),
    ]


# ---- weights


def meta_nets(config: CogVideoXConfig) -> dict[str, nn.Module]:
    """The three nets without memory."""
    with without_memory():
        return {
            "text_encoder": T5TextEncoder(config.text),
            "transformer": ExpertTransformer(config.transformer),
            "vae": CausalVAE(config.vae),
        }


@cache
def net_bytes(
    config: CogVideoXConfig, dtype: torch.dtype, quantize: QuantizeMode
) -> dict[str, tuple[int, int]]:
    """Per net (all its weights, the most of them at once when blocks take turns: two blocks and the rest)."""
    sizes = {}
    for name, net in meta_nets(config).items():
        blocks = blocks_of(net)
        mode = "none" if name == "vae" else quantize
        rest = Weights.of([net], without=blocks).nbytes * dtype.itemsize // 4  # meta nets are float32
        parts = [quantized_bytes(block, dtype, mode) for block in blocks]
        sizes[name] = rest + sum(parts), rest + sum(sorted(parts)[-2:])
    return sizes


# ---- work


@cache
def _text_work(config: T5Config, dtype: torch.dtype) -> int:
    with without_memory():
        net = T5TextEncoder(replace(config, num_layers=1)).to(dtype)
        ids = torch.zeros(1, config.text_len, dtype=torch.long)
    return peak_bytes(lambda: net(ids))


def _attend_nowhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a fused kernel allocates."""
    return torch.empty_like(q)


@cache
def _model_work(config: TransformerConfig, plan: Plan, dtype: torch.dtype, batch: int) -> int:
    shape = (batch, *plan.geometry.latent_shape(config.out_channels))
    with without_memory():
        model = ExpertTransformer(replace(config, num_layers=2), attend=_attend_nowhere).to(dtype)
        x = torch.zeros(shape, dtype=dtype)
        text = torch.zeros(batch, config.text_len, config.text_dim, dtype=dtype)
        predict = Predictor(
            model=model,
            text=text,
            negative=text if plan.guided else None,
            image_latents=x if config.in_channels > config.out_channels else None,
            ofs=plan.sampling.ofs if config.ofs_embed_dim else None,
        )
        states = 6 * x.numel() * torch.float32.itemsize  # the sampler's own
        return peak_bytes(lambda: predict(x, 999)) + states


@cache
def _decode_work(
    config: VAEConfig, size: tuple[int, int], latents: int, dtype: torch.dtype, tiled: bool
) -> int:
    """Of two pieces of one tile: what follows takes no more."""
    height, width = (side // config.space_factor for side in size)
    if tiled:
        height, width = (min(a, b) for a, b in zip((height, width), decode_tiles(config).size, strict=True))
    most = latents if config.decode_latents == 0 else min(latents, 2 * config.decode_latents + 1)
    with without_memory():
        vae = CausalVAE(config).to(dtype)
        z = torch.zeros(1, config.latent_channels, most, height, width, dtype=dtype)
    return peak_bytes(lambda: vae.decode(z))


@cache
def _encode_work(
    config: VAEConfig, size: tuple[int, int], frames: int, dtype: torch.dtype, tiled: bool
) -> int:
    height, width = size
    if tiled:
        height, width = (min(a, b) for a, b in zip(size, encode_tiles(config).size, strict=True))
    most = frames if config.encode_frames == 0 else min(frames, 2 * config.encode_frames + 1)
    with without_memory():
        vae = CausalVAE(config).to(dtype)
        pixels = torch.zeros(1, 3, most, height, width, dtype=dtype)
    return peak_bytes(lambda: vae.encode(pixels))


def _video_bytes(plan: Plan, dtype: torch.dtype, batch: int) -> int:
    size = plan.geometry
    return batch * 3 * size.num_frames * size.height * size.width * dtype.itemsize


def _pieces(config: VAEConfig, chunk: str) -> Iterator[Savers]:
    """The model's own pieces, then (for "auto") halves of them, down to the smallest legal ones."""
    yield Savers()
    encode, decode = config.encode_frames or 64, config.decode_latents or 16
    while chunk == "auto" and (encode > config.time_factor or decode > 2):
        encode = max(config.time_factor, encode // 2 // config.time_factor * config.time_factor)
        decode = max(2, decode // 4 * 2)
        yield Savers(encode_frames=encode, decode_latents=decode)
