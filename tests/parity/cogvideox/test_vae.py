"""The VAE against recorded outputs of the released SAT code, against diffusers live, and at full size."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from cogvideox_diff.checkpoints import DIFFUSERS_VAE, SAT_VAE
from cogvideox_diff.config import VAEConfig
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.checkpoints import convert, invert, load_into, load_tensors
from tests.figures import record_figure
from tests.parity.recorded import case_folder, read_json, read_tensors

TOLERANCE = 2e-5  # of the largest value, as the recorded data's own description suggests


def relative_error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape, f"{list(got.shape)} instead of {list(wanted.shape)}"
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def assert_close(name: str, got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    error = relative_error(got, wanted)
    print(f"{name}: relative maximum error {error:.1e}")
    record_figure(f"VAE {name}", error, tolerance)
    assert error <= tolerance, f"{name}: {error:.1e}"


# ---- recorded


@cache
def recorded() -> tuple[CausalVAE, dict[str, Tensor]]:
    folder = case_folder("cogvideox") / "sat_tiny" / "vae"
    meta = read_json(folder / "meta.json")
    sizes = meta["diffusers_config"]
    config = VAEConfig(
        latent_channels=sizes["latent_channels"],
        widths=tuple(sizes["block_out_channels"]),
        blocks_per_level=sizes["layers_per_block"],
        norm_groups=sizes["norm_num_groups"],
        temporal_levels=sizes["temporal_compression_ratio"].bit_length() - 1,
        encode_frames=0,
    )
    weights = convert(load_tensors(folder / "3d-vae.pt"), SAT_VAE)
    vae = load_into(CausalVAE(config), weights, dtype=torch.float32).eval()
    return vae, read_tensors(folder / "io.safetensors")


def with_config(vae: CausalVAE, **changes: object) -> CausalVAE:
    """The same weights under other settings."""
    other = CausalVAE(replace(vae.config, **changes)).eval()
    other.load_state_dict(vae.state_dict())
    return other


@pytest.mark.parity
@torch.no_grad()
@pytest.mark.parametrize(("case", "frames"), [("encode", None), ("encode_image", 1)])
def test_recorded_encode(case: str, frames: int | None) -> None:
    vae, io = recorded()
    video = io["video_uint8"].float() / 127.5 - 1
    posterior = vae.encode(video[:, :, :frames])
    mean, logvar = io[f"{case}.moments"].chunk(2, dim=1)
    assert_close(f"{case} mean", posterior.mean, mean)
    assert_close(f"{case} logvar", posterior.logvar, logvar)


@pytest.mark.parity
@torch.no_grad()
def test_recorded_kl() -> None:
    vae, io = recorded()
    posterior = vae.encode(io["video_uint8"].float() / 127.5 - 1)
    assert_close("kl", posterior.kl().view(1), io["encode.kl"])


@pytest.mark.parity
@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "latents", "chunk", "single_frame"),
    [
        ("decode.chunked", None, 2, "odd_count"),
        ("decode.single_pass", None, 0, "odd_count"),
        ("decode.single_pass", None, 0, "first_piece"),
        ("decode.newest_engine_cp1", None, 2, "never"),
        ("decode_image", 1, 2, "odd_count"),
    ],
)
def test_recorded_decode(case: str, latents: int | None, chunk: int, single_frame: str) -> None:
    vae, io = recorded()
    vae = with_config(vae, decode_latents=chunk, single_frame=single_frame)
    assert_close(case, vae.decode(io["latents"][:, :, :latents]), io[case])


@pytest.mark.parity
@torch.no_grad()
def test_recorded_pieces_are_part_of_the_model() -> None:
    """The wrong piece length must not pass as the right one."""
    vae, io = recorded()
    wrong = with_config(vae, decode_latents=2).decode(io["latents"])
    assert relative_error(wrong, io["decode.single_pass"]) > 100 * TOLERANCE


# ---- full size


def test_full_size_manifest() -> None:
    manifest = read_json(case_folder("cogvideox") / "manifests" / "vae.json")
    released = {name: torch.empty(shape, device="meta") for name, shape in manifest["tensors"].items()}
    with torch.device("meta"):
        ours = CausalVAE(VAEConfig()).state_dict()
    there = {name: list(x.shape) for name, x in convert(released, DIFFUSERS_VAE).items()}
    back = {name: list(x.shape) for name, x in invert(ours, DIFFUSERS_VAE).items()}
    assert there == {name: list(x.shape) for name, x in ours.items()}
    assert back == manifest["tensors"]
    assert sum(x.numel() for x in ours.values()) == manifest["parameters"]


# ---- diffusers live


@cache
def peers() -> tuple[CausalVAE, object]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = VAEConfig(
        latent_channels=4, widths=(16, 32, 32, 64), blocks_per_level=2, norm_groups=8, sample_size=(96, 160)
    )
    peer = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=config.widths,
        latent_channels=config.latent_channels,
        layers_per_block=config.blocks_per_level,
        norm_num_groups=config.norm_groups,
        sample_height=config.sample_size[0],
        sample_width=config.sample_size[1],
    ).eval()
    with torch.no_grad():
        for parameter in peer.parameters():  # norms start at 1 and 0, which would hide a mistake
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = load_into(CausalVAE(config), convert(peer.state_dict(), DIFFUSERS_VAE)).eval()
    return ours, peer


def peer_settings(peer: object, *, tiled: bool, sliced: bool) -> None:
    peer.enable_tiling() if tiled else peer.disable_tiling()
    peer.enable_slicing() if sliced else peer.disable_slicing()


def said(what: str, frames: int, tiled: bool, sliced: bool) -> str:
    plural = "s" if frames > 1 else ""
    return f"{what}, {frames} frame{plural}{', tiled' * tiled}{', sliced' * sliced}"


RUNS = [
    (1, False, False),
    (5, False, False),
    (9, False, False),
    (17, False, False),
    (21, False, False),
    (9, True, False),
    (9, False, True),
]


@pytest.mark.peers
@torch.no_grad()
@pytest.mark.parametrize(("frames", "tiled", "sliced"), RUNS)
def test_diffusers_encode(frames: int, tiled: bool, sliced: bool) -> None:
    ours, peer = peers()
    peer_settings(peer, tiled=tiled, sliced=sliced)
    height, width = (56, 152) if tiled else (16, 24)
    pixels = torch.rand(2 if sliced else 1, 3, frames, height, width) * 2 - 1
    wanted = peer.encode(pixels).latent_dist
    got = ours.encode(pixels, tiled=tiled, sliced=sliced)
    assert_close(said("mean", frames, tiled, sliced), got.mean, wanted.mean)
    assert_close(said("logvar", frames, tiled, sliced), got.logvar, wanted.logvar)


@pytest.mark.peers
@torch.no_grad()
@pytest.mark.parametrize(("frames", "tiled", "sliced"), [(8, False, False), (45, False, False), *RUNS])
def test_diffusers_decode(frames: int, tiled: bool, sliced: bool) -> None:
    """Frames and latents differ by design for even latent counts (8 frames: 2 latents)."""
    ours, peer = peers()
    peer_settings(peer, tiled=tiled, sliced=sliced)
    height, width = (7, 19) if tiled else (2, 3)
    latents = torch.randn(2 if sliced else 1, ours.config.latent_channels, (frames + 3) // 4, height, width)
    wanted = peer.decode(latents).sample
    got = ours.decode(latents, tiled=tiled, sliced=sliced)
    assert_close(said("pixels", frames, tiled, sliced), got, wanted)
