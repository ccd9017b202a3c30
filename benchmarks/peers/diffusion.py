"""Rows of the diffusion family beside diffusers: a guided step, the VAE both ways, a whole video.

The sizes are those at which a CPU ends in minutes (`gpu.py` has the full ones). Weights are random and the
same on both sides, carried over by our checkpoint tables run backwards.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import registry
from benchmarks.peers.harness import Case, Pair, Run, relative_difference
from shared.checkpoints import invert

PROMPT = "a red circle moves left"
TIMESTEP = 500
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cases() -> list[Case]:
    step = "transformer, 4 layers of 1024, 1650 + 226 tokens, rotary positions, both halves of guidance"
    read, written = "VAE of the released widths, 9 frames of 64 x 96 encoded", "the same, decoded"
    rows: list[Case] = []
    for name, dtype in DTYPES.items():
        rows += [
            Case(name=f"diffusion/step-{name}", words=step, build=partial(step_pair, dtype)),
            Case(name=f"diffusion/decode-{name}", words=written, build=partial(decode_pair, dtype)),
            Case(name=f"diffusion/encode-{name}", words=read, build=partial(encode_pair, dtype)),
            Case(
                name=f"diffusion/decode-memory-{name}",
                words="VAE of half the released widths, 9 frames of 128 x 192 decoded: tensors held at once",
                build=partial(decode_pair, dtype, widths=(64, 128, 128, 256), latents=(3, 16, 24)),
                kind="memory",
            ),
        ]
    rows.append(
        Case(name="diffusion/demo-video", words="prompt to frames with the demo weights", build=demo_pair)
    )
    return rows


# ---- the two sides


def ours_of(module: str) -> Any:
    return registry.module("cogvideox", module)


def seeded(build: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval().requires_grad_(False).to(device, dtype)


def peer_of(ours: nn.Module, config: Any, part: str, dtype: torch.dtype, device: str) -> nn.Module:
    """diffusers' net with the weights of `ours`."""
    diffusers: Any = importlib.import_module("diffusers")
    kinds = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}
    table = getattr(ours_of("checkpoints"), f"DIFFUSERS_{part.upper()}")
    with torch.device(device):
        peer = getattr(diffusers, kinds[part]).from_config(
            ours_of("diffusers_config").diffusers_configs(config)[part]
        )
    peer.load_state_dict(invert(ours.state_dict(), table), strict=True)
    return peer.eval().requires_grad_(False).to(device, dtype)


def randn(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


# ---- a step


Latents = tuple[int, int, int]  # frames, rows, columns


def step_config(*, tiny: bool = False) -> tuple[Any, Latents]:
    """(model, latents) of the middle size; `tiny`: of one that takes no time, for tests."""
    config = ours_of("config").cogvideox_5b()
    size: Latents = (2, 6, 8) if tiny else (5, 30, 44)
    net = replace(config.transformer, num_layers=4, num_heads=16, sample_size=size, text_dim=512)
    if tiny:
        net = replace(net, num_layers=1, num_heads=2, head_dim=16, time_embed_dim=16, text_dim=8, text_len=5)
    text = replace(config.text, d_model=net.text_dim, text_len=net.text_len)
    return replace(config, transformer=net, text=text), size


def step_pair(dtype: torch.dtype, *, tiny: bool = False) -> Pair:
    return step_beside_peer(*step_config(tiny=tiny), dtype, "cpu")


def guided_step(
    config: Any,
    latents: Latents,
    dtype: torch.dtype,
    device: str,
    *,
    share: Callable[[Any], Any] = lambda net: net,
) -> tuple[Any, Run]:
    """(our net, what makes one step: both halves of guidance [2, T, C, H, W], the prompt's last). `share`
    makes of the net one of several processes."""
    net = config.transformer
    with torch.device(device):
        ours = seeded(partial(ours_of("transformer").ExpertTransformer, net), dtype, device)
    x, text = step_inputs(config, latents, dtype, device)
    predict = ours_of("guidance").Predictor(model=share(ours), text=text[1:], negative=text[:1])

    def run() -> Tensor:
        with_prompt, without = predict(x, TIMESTEP)
        return torch.cat([without, with_prompt])

    return ours, run


def step_inputs(config: Any, latents: Latents, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """The sample [1, T, C, H, W] and both texts [2, L, D]."""
    net, (frames, *size) = config.transformer, latents
    x = randn(1, frames, net.in_channels, *size, dtype=dtype, device=device)
    return x, randn(2, net.text_len, net.text_dim, dtype=dtype, device=device)


def step_beside_peer(
    config: Any,
    latents: Latents,
    dtype: torch.dtype,
    device: str,
    *,
    compiled: bool = False,
    graph: bool = False,
) -> Pair:
    """`compiled`: both sides; `graph`: ours as one CUDA graph."""
    accelerate = ours_of("acceleration").Acceleration(
        compile="blocks" if compiled else "graph" if graph else "none"
    )
    ours, run_ours = guided_step(config, latents, dtype, device, share=accelerate.apply)
    peer = peer_of(ours, config, "transformer", dtype, device)
    x, text = step_inputs(config, latents, dtype, device)
    rope = ours.rope(ours.grid_of(x, text), 0, x.device)
    rotary = None if rope is None else tuple(part.repeat_interleave(2, dim=1) for part in rope)
    if compiled:
        peer.compile()

    def run_peer() -> Tensor:
        times = torch.full((2,), TIMESTEP, device=device)
        out = peer(torch.cat([x, x]), text, times, image_rotary_emb=rotary, return_dict=False)
        return out[0]

    return Pair(ours=run_ours, peer=run_peer, difference=lambda: relative_difference(run_ours(), run_peer()))


# ---- the VAE


def _vaes(dtype: torch.dtype, device: str, widths: tuple[int, ...]) -> tuple[Any, Any]:
    config = ours_of("config").cogvideox_5b()
    config = replace(config, vae=replace(config.vae, widths=widths))
    with torch.device(device):
        ours = seeded(partial(ours_of("vae.autoencoder").CausalVAE, config.vae), dtype, device)
    return ours, peer_of(ours, config, "vae", dtype, device)


WIDTHS = (128, 256, 256, 512)


def decode_pair(
    dtype: torch.dtype,
    *,
    widths: tuple[int, ...] = WIDTHS,
    latents: tuple[int, int, int] = (3, 8, 12),
    device: str = "cpu",
) -> Pair:
    ours, peer = _vaes(dtype, device, widths)
    z = randn(1, 16, *latents, dtype=dtype, device=device)

    def difference() -> float:
        return relative_difference(ours.decode(z), peer.decode(z).sample)

    return Pair(ours=lambda: ours.decode(z), peer=lambda: peer.decode(z).sample, difference=difference)


def encode_pair(dtype: torch.dtype) -> Pair:
    ours, peer = _vaes(dtype, "cpu", WIDTHS)
    pixels = randn(1, 3, 9, 64, 96, dtype=dtype, device="cpu").clamp(-1, 1)

    def difference() -> float:
        return relative_difference(ours.encode(pixels).mean, peer.encode(pixels).latent_dist.mean)

    return Pair(
        ours=lambda: ours.encode(pixels).mean, peer=lambda: peer.encode(pixels), difference=difference
    )


# ---- a whole video


def demo_pair() -> Pair:
    """The demo's prompt to frames; diffusers' pipeline reads what our pipeline writes in its layout."""
    diffusers: Any = importlib.import_module("diffusers")
    source = registry.resolve("cogvideox-demo").source
    ours: Any = ours_of("pipeline").CogVideoXPipeline.from_pretrained(source, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(Path(folder) / "demo", format="diffusers")
        peer = diffusers.CogVideoXPipeline.from_pretrained(Path(folder) / "demo")
    peer.set_progress_bar_config(disable=True)
    settings = ours.settings()
    size = {name: settings[name] for name in ("num_frames", "height", "width")}
    sampling = {name: settings[name] for name in ("num_inference_steps", "guidance_scale")}

    def run_ours() -> Any:
        return ours(PROMPT, output_type="np")

    def run_peer() -> Any:
        random = torch.Generator().manual_seed(0)
        length = ours.config.text.text_len
        return peer(
            PROMPT, generator=random, max_sequence_length=length, output_type="np", **size, **sampling
        ).frames[0]

    return Pair(ours=run_ours, peer=run_peer, facts={"steps": sampling["num_inference_steps"]})
