"""Context parallelism of the VAE against recorded outputs of the released SAT code on two processes."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from torch import Tensor

from cogvideox_diff.checkpoints import SAT_VAE
from cogvideox_diff.config import VAEConfig
from cogvideox_diff.parallel import frame_sizes, run_own_frames
from cogvideox_diff.vae.autoencoder import CausalVAE, Posterior
from shared.checkpoints import convert, load_into, load_tensors
from shared.distributed import ParallelContext
from tests.distributed.launch import run_ranks
from tests.figures import record_figure
from tests.parity.recorded import case_folder, read_json, read_tensors

TOLERANCE = 2e-5  # of the largest value, as the recorded data's own description suggests


@cache
def recorded_vae() -> CausalVAE:
    folder = case_folder("cogvideox") / "sat_tiny" / "vae"
    sizes = read_json(folder / "meta.json")["diffusers_config"]
    config = VAEConfig(
        latent_channels=sizes["latent_channels"],
        widths=tuple(sizes["block_out_channels"]),
        blocks_per_level=sizes["layers_per_block"],
        norm_groups=sizes["norm_num_groups"],
        temporal_levels=sizes["temporal_compression_ratio"].bit_length() - 1,
        encode_frames=0,
        decode_latents=0,
    )
    weights = convert(load_tensors(folder / "3d-vae.pt"), SAT_VAE)
    return load_into(CausalVAE(config), weights, dtype=torch.float32).eval()


@cache
def recorded_io() -> dict[str, Tensor]:
    return read_tensors(case_folder("cogvideox") / "sat_tiny" / "vae" / "io.safetensors")


def recorded_parts() -> list[Tensor]:
    """`cp<ranks>.encode_mean.rank<n>` in order."""
    io, pattern = recorded_io(), re.compile(r"cp(\d+)\.encode_mean\.rank(\d+)")
    found = [match for match in map(pattern.fullmatch, io) if match]
    parts = [io[match.group()] for match in sorted(found, key=lambda match: int(match.group(2)))]
    assert len(parts) > 1 and {int(match.group(1)) for match in found} == {len(parts)}
    return parts


def own_parts(world: ParallelContext) -> tuple[Tensor, Tensor]:
    """This rank's share of the latents' mean and of the decoded pixels, before anything is gathered."""
    vae, io = recorded_vae(), recorded_io()
    video = io["video_uint8"].float() / 127.5 - 1
    moments = run_own_frames(vae.encoder, video, world, single_frame="first_piece")
    pixels = run_own_frames(vae.decoder, io["latents"], world, single_frame=vae.config.single_frame)
    return Posterior.from_moments(moments).mean, pixels


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tensor, Tensor]]:
    return run_ranks(own_parts, tmp_path_factory.mktemp("ranks"), world_size=len(recorded_parts()))


def assert_close(name: str, got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape, f"{name}: {list(got.shape)} instead of {list(wanted.shape)}"
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    print(f"{name}: relative maximum error {error:.1e}")
    record_figure(f"VAE on two processes: {name}", error, TOLERANCE)
    assert error <= TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parity
@pytest.mark.distributed
def test_recorded_encode_of_each_rank(results: list[tuple[Tensor, Tensor]]) -> None:
    for rank, ((mean, _), wanted) in enumerate(zip(results, recorded_parts(), strict=True)):
        assert_close(f"encode mean of rank {rank}", mean, wanted)


@pytest.mark.parity
@pytest.mark.distributed
def test_recorded_decode_of_each_rank(results: list[tuple[Tensor, Tensor]]) -> None:
    """The parts of the recorded single pass, cut by upstream's rule."""
    whole = recorded_io()["decode.single_pass"]
    unit = recorded_vae().config.time_factor
    parts = whole.split(frame_sizes(whole.shape[2], len(results), unit=unit, single=True), dim=2)
    for rank, ((_, pixels), wanted) in enumerate(zip(results, parts, strict=True)):
        assert_close(f"decoded frames of rank {rank}", pixels, wanted)
