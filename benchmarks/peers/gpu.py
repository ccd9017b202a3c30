"""Rows at full size, for a GPU: a guided step and decoding of 49 x 480 x 720 beside diffusers, a step of the
autoregressive key frames beside the release's cost structure. Weights are random.

Each tells what part of the device's own rate it reaches (`of_floor`): the rate of matrix products, or of
copying memory, measured in the same run. Nothing here has to run on a CPU; the tests build every row on it at
a size that takes no time, and the full sizes on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import registry
from benchmarks.peers import ar, diffusion
from benchmarks.peers.diffusion import Latents
from benchmarks.peers.harness import Case, Pair, seconds_of
from shared.graphs import Capture

FULL: Latents = (13, 60, 90)  # of 49 x 480 x 720
PRESETS = ("cogvideox-2b", "cogvideox-5b")
SLOT = 1800  # of stage 1: the fifth frame


def cases() -> list[Case]:
    words = "a guided step of 49 x 480 x 720 in bfloat16, part of the rate of matrix products"
    how = {"": "", "-compiled": ", both compiled", "-graph": ", ours as one CUDA graph"}
    rows = [
        _case(f"diffusion/full-step-{preset}{end}", words + how[end], partial(step_pair, preset, end))
        for preset in PRESETS
        for end in how
    ]
    decode = "49 x 480 x 720 decoded in bfloat16 without tiles, part of the rate of matrix products"
    step = "guided steps with sampling of CogVideo's first stage behind 1800 slots in float16"
    step += ", part of the memory's rate"
    return [
        *rows,
        _case("diffusion/full-decode", decode, decode_pair),
        _case("ar/full-step", step, ar_pair),
        _case("ar/full-step-graph", f"{step}, ours as CUDA graphs", partial(ar_pair, recorder=graph_pool)),
    ]


def _case(name: str, words: str, build: Callable[[], Pair]) -> Case:
    return Case(name=name, words=words, build=build, device="cuda")


def step_pair(preset: str, end: str, *, device: str = "cuda", tiny: bool = False) -> Pair:
    """`end`: "", "-compiled" (both sides) or "-graph" (ours)."""
    if tiny:
        config, latents = diffusion.step_config(tiny=True)
    else:
        config, latents = diffusion.ours_of("config").PRESETS[preset](), FULL
    pair = diffusion.step_beside_peer(
        config, latents, torch.bfloat16, device, compiled=end == "-compiled", graph=end == "-graph"
    )
    net, costs = config.transformer, diffusion.ours_of("costs")
    grid = tuple(n // p for n, p in zip(latents, net.patch_size, strict=True))
    parts = costs.transformer_parts(net, grid, 2, torch.bfloat16.itemsize)
    return with_rate(pair, sum(part.flops for part in parts), device)


def decode_pair(*, device: str = "cuda", tiny: bool = False) -> Pair:
    widths = (32, 32, 32, 32) if tiny else diffusion.WIDTHS
    latents: Latents = (3, 2, 2) if tiny else FULL
    pair = diffusion.decode_pair(torch.bfloat16, widths=widths, latents=latents, device=device)
    config = replace(diffusion.ours_of("config").cogvideox_5b().vae, widths=widths)
    parts = diffusion.ours_of("costs").decode_parts(config, latents, torch.bfloat16.itemsize)
    return with_rate(pair, sum(part.flops for part in parts), device)


def with_rate(pair: Pair, flops: int, device: str) -> Pair:
    """The pair with what its work would take at the device's rate of matrix products."""
    facts = {"flops": flops}
    if device != "meta":
        rate = matmul_rate(device, size=8192 if device == "cuda" else 256)
        facts |= {"matmul_flops_per_second": rate, "floor_seconds": flops / rate}
    return replace(pair, facts=pair.facts | facts)


def matmul_rate(device: str, *, size: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations per second of a square product by the wall, the median of some runs."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = sorted(seconds_of(lambda: a @ b, device).wall for _ in range(12))
    return 2 * size**3 / times[6]


def copy_rate(device: str, *, size: int) -> float:
    """Bytes per second of a copy by the wall, read and written both counted."""
    data = torch.ones(size, device=device, dtype=torch.uint8)
    out = torch.empty_like(data)
    times = sorted(seconds_of(lambda: out.copy_(data), device).wall for _ in range(12))
    return 2 * size / times[6]


# ---- the autoregressive family


def graph_pool() -> Capture:
    return ar.ours_of("graph_step").graph_pool()


def ar_pair(
    *, recorder: Callable[[], Capture] | None = None, device: str = "cuda", tiny: bool = False
) -> Pair:
    """`ar.STEPS` guided tokens of one sample from caches full of zeros: what is read does not matter here.
    `recorder`: of our steps as graphs."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    config = registry.module("cogvideo", "config").cogvideo().keyframes
    slot = SLOT
    if tiny:
        config, slot = ar.transformers(torch.float32, 4)[0].config, 20
    model = filled(lambda: ar.ours_of("transformer").CogVideoTransformer(config), dtype, device)
    model.recorder = recorder
    layout = ar.ours_of("layout").keyframe_layout(config, ar.TEXT_LEN)
    text = [[config.pad_token] * ar.TEXT_LEN] * 2
    frames = torch.zeros(1, slot // config.frame_len, config.frame_len, dtype=torch.long, device=device)
    given = {"groups": 2, "text_weight": 0.0, "release": False}
    state = ar.ours_of("generation").prefill(model, layout, text, frames, **given)
    token = torch.zeros(1, dtype=torch.long, device=device)
    while state.next_slot < slot:
        model.step(token.repeat(2), state)
    needed = ar.STEPS * ar.step_bytes(model, layout, 2, slot)
    rate = copy_rate(device, size=2**31 if device == "cuda" else 2**20)
    facts = {"tokens": ar.STEPS, "bytes": needed, "bytes_per_second": rate, "floor_seconds": needed / rate}
    return ar.guided_pair(model, state, token.expand(ar.STEPS, 1), facts)


def filled(build: Callable[[], Any], dtype: torch.dtype, device: str) -> Any:
    """A net whose weights are drawn on the device, in its type."""
    with torch.device("meta"):
        net = build().to(dtype)
    net.to_empty(device=device).eval().requires_grad_(False)
    random = torch.Generator(device=device).manual_seed(0)
    for parameter in net.parameters():
        parameter.normal_(0, 0.02, generator=random)
    return net
