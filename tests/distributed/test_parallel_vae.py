"""The VAE over several ranks against one process: whole clips, pieces, tiles, and short parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogvideox_diff.config import VAEConfig
from cogvideox_diff.parallel import FramesContext, parallel_vae
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.distributed import ParallelContext
from shared.errors import SettingError
from tests.distributed.launch import run_ranks

TOLERANCE = 1e-5  # of the largest value; norms add up in another order
TINY = VAEConfig(
    latent_channels=4, widths=(8, 16, 16, 16), blocks_per_level=1, norm_groups=4, sample_size=(96, 160)
)
WHOLE = replace(TINY, encode_frames=0, decode_latents=0)
# name: configuration, pixel frames to encode, latent frames to decode, height and width in latents, tiled
CLIPS: dict[str, tuple[VAEConfig, int, int, tuple[int, int], bool]] = {
    "whole": (WHOLE, 17, 7, (1, 2), False),
    "whole, a remainder": (WHOLE, 21, 6, (1, 2), False),
    "whole, fewer frames than a convolution sees": (WHOLE, 13, 4, (1, 2), False),
    "whole, even count": (replace(WHOLE, single_frame="odd_count"), 13, 6, (1, 2), False),
    "whole, no single frame": (replace(WHOLE, single_frame="never"), 13, 5, (1, 2), False),
    "whole, tiled": (WHOLE, 13, 5, (1, 11), True),
    "image": (WHOLE, 1, 1, (1, 2), False),
    "pieces": (TINY, 33, 9, (1, 2), False),
    "fewer pieces than ranks": (TINY, 17, 5, (1, 2), False),
    "even pieces, a single first frame": (replace(TINY, single_frame="first_piece"), 25, 6, (1, 2), False),
    "one piece": (TINY, 9, 3, (1, 2), False),
    "pieces, tiled": (TINY, 17, 5, (1, 11), True),
}
# clips by number of ranks: only of three is one in the middle
CASES = {2: ["whole", "whole, even count", "pieces"], 3: list(CLIPS)}


def build(config: VAEConfig) -> CausalVAE:
    torch.manual_seed(0)
    vae = CausalVAE(config).eval()
    with torch.no_grad():
        for parameter in vae.parameters():  # norms start at 1 and 0, which would hide a mistake
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae


def run_clips(world: ParallelContext | None) -> dict[str, Tensor]:
    """Clips there and back; None is the plain VAE."""
    results = {}
    for name in CLIPS if world is None else CASES[world.degree]:
        config, frames, latents, (height, width), tiled = CLIPS[name]
        vae = build(config)
        vae = vae if world is None else parallel_vae(vae, world)
        generator = torch.Generator().manual_seed(1)
        factor = config.space_factor
        batch = 2 if name in ("whole", "pieces") else 1
        pixels = torch.rand(batch, 3, frames, factor * height, factor * width, generator=generator) * 2 - 1
        z = torch.randn(batch, config.latent_channels, latents, height, width, generator=generator)
        results[f"{name}: mean"] = vae.encode(pixels, tiled=tiled).mean
        results[f"{name}: pixels"] = vae.decode(z, tiled=tiled)
    return results


def on_ranks(world: ParallelContext) -> dict[str, Any]:
    results: dict[str, Any] = dict(run_clips(world))
    vae = parallel_vae(build(WHOLE), world)
    with pytest.raises(SettingError) as refused:
        vae.encode(torch.zeros(1, 3, 5, 8, 8))
    results["refused"] = str(refused.value)
    norm, x = shifted_norm()
    own = x.tensor_split(world.degree, dim=2)[world.rank]
    results["norm"] = FramesContext(world, single=True).group_norm(norm, own)
    results["half"] = parallel_vae(build(WHOLE).bfloat16(), world).decode(half_latents())
    return results


def shifted_norm() -> tuple[nn.GroupNorm, Tensor]:
    """A mean far above the deviation: a sum of squares in float32 would lose the deviation."""
    x = torch.randn(2, 8, 7, 4, 4, generator=torch.Generator().manual_seed(2)) + 1000
    return nn.GroupNorm(4, 8, eps=1e-6), x


def half_latents() -> Tensor:
    return torch.randn(1, 4, 5, 2, 2, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    with torch.no_grad():
        return run_clips(None)


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """The results of each rank by number of ranks, which are started once."""
    return cache(lambda degree: run_ranks(on_ranks, tmp_path_factory.mktemp("ranks"), world_size=degree))


@pytest.fixture(params=CASES)
def results(
    request: pytest.FixtureRequest, results_of: Callable[[int], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    return results_of(request.param)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["mean", "pixels"])
@pytest.mark.parametrize(("degree", "clip"), [(degree, clip) for degree in CASES for clip in CASES[degree]])
def test_equals_one_process(
    alone: dict[str, Tensor],
    results_of: Callable[[int], list[dict[str, Any]]],
    degree: int,
    clip: str,
    what: str,
) -> None:
    name = f"{clip}: {what}"
    for result in results_of(degree):
        error = relative_error(result[name], alone[name])
        print(f"{name}, {degree} ranks: relative maximum error {error:.1e}")
        assert error <= TOLERANCE


@pytest.mark.distributed
def test_norm_far_from_zero(results: list[dict[str, Any]]) -> None:
    norm, x = shifted_norm()
    wanted = norm.double()(x.double())
    got = torch.cat([result["norm"] for result in results], dim=2)
    assert (got - wanted).abs().max() < 1e-3  # float32 at 1000 resolves 6e-5


@pytest.mark.distributed
@torch.no_grad()
def test_half_precision(results: list[dict[str, Any]]) -> None:
    wanted = build(WHOLE).bfloat16().decode(half_latents())
    assert all(relative_error(result["half"], wanted) < 0.05 for result in results)


@pytest.mark.distributed
def test_too_many_ranks_are_refused(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert f"VAE with 5 frames: {len(results)} processes are not legal; legal: 1" in result["refused"]


@torch.no_grad()
def test_whole_clips_and_pieces_are_different_models() -> None:
    """Else equality above would not tell the two schemes apart."""
    z = torch.randn(1, 4, 13, 2, 3, generator=torch.Generator().manual_seed(1))
    assert relative_error(build(WHOLE).decode(z), build(TINY).decode(z)) > 100 * TOLERANCE


def test_weights_are_the_vaes_own() -> None:
    vae = build(TINY)
    ours = dict(vae.named_parameters())
    parallel = parallel_vae(vae, ParallelContext())
    assert all(parameter is ours[name] for name, parameter in parallel.named_parameters())
    assert not parallel.training
