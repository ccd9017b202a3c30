"""Positions at other resolutions and lengths than the native ones, against diffusers' own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cogvideox_diff.config import PRESETS, TransformerConfig
from cogvideox_diff.geometry import VideoGeometry
from cogvideox_diff.positions import rope_angles, rope_coordinates, sincos_table

SIZES = {  # (height, width, frames)
    "cogvideox-5b": [
        (480, 720, 49),
        (480, 720, 9),
        (720, 480, 25),
        (256, 256, 17),
        (640, 1120, 41),
        (48, 720, 1),
    ],
    "cogvideox-1.5-5b": [(768, 1360, 81), (1360, 768, 17), (512, 512, 161), (2400, 2400, 1)],
}
CASES = [(name, size) for name, sizes in SIZES.items() for size in sizes]


def peer_of(config: TransformerConfig) -> SimpleNamespace:
    """As much of a diffusers pipeline as its method asks for."""
    t, h, _ = config.patch_size
    told = SimpleNamespace(
        patch_size=h,
        patch_size_t=None if t == 1 else t,
        sample_height=config.sample_size[1],
        sample_width=config.sample_size[2],
        attention_head_dim=config.head_dim,
    )
    return SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=told))


@pytest.mark.peers
@pytest.mark.parametrize(("name", "size"), CASES)
def test_rope_at_other_sizes(name: str, size: tuple[int, int, int]) -> None:
    """Resized and cropped into the native box (1.0), or plain integers of the padded length (1.5)."""
    diffusers = pytest.importorskip("diffusers")
    config = PRESETS[name]()
    geometry = VideoGeometry.of(config, height=size[0], width=size[1], num_frames=size[2])
    prepare = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings
    wanted = prepare(
        peer_of(config.transformer), size[0], size[1], geometry.padded_latent_frames, torch.device("cpu")
    )
    net = config.transformer
    angles = rope_angles(rope_coordinates(geometry.grid, net.sample_grid, net.grid_rule), net.head_dim)
    assert angles.shape[0] == geometry.num_tokens
    for got, table in zip((angles.cos(), angles.sin()), wanted, strict=True):
        assert float((got.repeat_interleave(2, dim=1) - table).abs().max()) < 2e-5


@pytest.mark.peers
@pytest.mark.parametrize("size", [(480, 720, 49), (480, 720, 17), (256, 384, 9), (720, 480, 1)])
def test_sincos_at_other_sizes(size: tuple[int, int, int]) -> None:
    """The fixed table of 2b is computed for the size that is asked for."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    config = PRESETS["cogvideox-2b"]()
    time, rows, columns = VideoGeometry.of(config, height=size[0], width=size[1], num_frames=size[2]).grid
    table = embeddings.get_3d_sincos_pos_embed(
        64, (columns, rows), time, config.transformer.sincos_scale, 1.0, output_type="pt"
    )
    got = sincos_table((time, rows, columns), 64, scale=config.transformer.sincos_scale)
    assert float((got - table.flatten(0, 1).float()).abs().max()) < 1e-6
