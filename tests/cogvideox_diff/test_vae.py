"""The 3D causal VAE: causality, pieces, tiles, gradients, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox_diff.config import VAEConfig
from cogvideox_diff.vae.autoencoder import (
    CausalVAE,
    Posterior,
    scale_image_latents,
    scale_latents,
    unscale_latents,
)
from cogvideox_diff.vae.blocks import convolve_doubled, halve_time, modulate, stretch_time
from cogvideox_diff.vae.causal_conv import (
    CausalConv3d,
    ClipContext,
    chunk_bounds,
    conv_by_frames,
    conv_by_products,
)
from cogvideox_diff.vae.tiling import blend, decode_tiles, encode_tiles

TINY = VAEConfig(
    latent_channels=4, widths=(8, 16, 16, 16), blocks_per_level=1, norm_groups=8, sample_size=(96, 160)
)


class PerFrameContext(ClipContext):
    """Group norm statistics per frame: the only coupling of frames that is not causal is gone."""

    def group_norm(self, norm: nn.GroupNorm, x_BCTHW: Tensor) -> Tensor:
        return torch.cat([norm(frame) for frame in x_BCTHW.split(1, dim=2)], dim=2)


@pytest.fixture
def vae() -> CausalVAE:
    torch.manual_seed(0)
    return CausalVAE(TINY).eval()


def run_in_pieces(stage: nn.Module, x: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    context = PerFrameContext()
    pieces = []
    for start, end in bounds:
        pieces.append(stage(x[:, :, start:end], context))
        context.first_piece = False
    return torch.cat(pieces, dim=2)


def clip(frames: int, height: int = 16, width: int = 24, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, height, width) * 2 - 1


def latents(frames: int, height: int = 2, width: int = 3) -> Tensor:
    return torch.randn(1, TINY.latent_channels, frames, height, width)


# ---- pieces and causality


@pytest.mark.parametrize(
    ("frames", "chunk", "bounds"),
    [
        (13, 2, [(0, 3), (3, 5), (5, 7), (7, 9), (9, 11), (11, 13)]),
        (12, 2, [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12)]),
        (17, 8, [(0, 9), (9, 17)]),
        (13, 8, [(0, 13)]),
        (5, 8, [(0, 5)]),
        (1, 2, [(0, 1)]),
        (13, 0, [(0, 13)]),
    ],
)
def test_chunk_bounds(frames: int, chunk: int, bounds: list[tuple[int, int]]) -> None:
    assert chunk_bounds(frames, chunk) == bounds


@torch.no_grad()
def test_encoder_sees_no_later_frame(vae: CausalVAE) -> None:
    before = clip(13)
    after = torch.cat([before[:, :, :9], clip(4)], dim=2)
    z, z_changed = (vae.encoder(x, PerFrameContext()) for x in (before, after))
    torch.testing.assert_close(z[:, :, :3], z_changed[:, :, :3])
    assert not torch.allclose(z[:, :, 3], z_changed[:, :, 3])


@torch.no_grad()
def test_decoder_sees_no_later_latent(vae: CausalVAE) -> None:
    before = latents(5)
    after = torch.cat([before[:, :, :3], latents(2)], dim=2)
    x, x_changed = (vae.decoder(z, PerFrameContext()) for z in (before, after))
    torch.testing.assert_close(x[:, :, :9], x_changed[:, :, :9])
    assert not torch.allclose(x[:, :, 9], x_changed[:, :, 9])


@torch.no_grad()
def test_pieces_equal_the_whole_when_statistics_do(vae: CausalVAE) -> None:
    x, z = clip(17), latents(5)
    for stage, whole, bounds in (
        (vae.encoder, x, [(0, 9), (9, 17)]),
        (vae.encoder, x, [(0, 1), (1, 5), (5, 17)]),
        (vae.decoder, z, [(0, 3), (3, 5)]),
        (vae.decoder, z, [(0, 1), (1, 2), (2, 5)]),
    ):
        torch.testing.assert_close(run_in_pieces(stage, whole, bounds), stage(whole, PerFrameContext()))


@torch.no_grad()
def test_piece_length_is_part_of_the_model(vae: CausalVAE) -> None:
    """Group norm over the piece: other pieces, other latents. One piece is the whole clip."""
    whole = CausalVAE(replace(TINY, encode_frames=0)).eval()
    whole.load_state_dict(vae.state_dict())
    assert not torch.allclose(vae.encode(x := clip(17)).mean, whole.encode(x).mean, atol=1e-3)
    torch.testing.assert_close(vae.encode(x := clip(13)).mean, whole.encode(x).mean)


@torch.no_grad()
def test_quirk_even_latent_count(vae: CausalVAE) -> None:
    sane = CausalVAE(replace(TINY, single_frame="first_piece")).eval()
    sane.load_state_dict(vae.state_dict())
    z = vae.encode(clip(5)).mode()
    assert z.shape[2] == 2
    assert vae.decode(z).shape[2] == 8
    assert sane.decode(z).shape[2] == 5
    assert [sane.decode(latents(n)).shape[2] for n in (1, 2, 3, 4)] == [1, 5, 9, 13]
    torch.testing.assert_close(vae.decode(z := latents(5)), sane.decode(z))


def test_time_resampling() -> None:
    x = torch.arange(5.0).view(1, 1, 5, 1, 1)
    assert halve_time(x, True).flatten().tolist() == [0, 1.5, 3.5]
    assert halve_time(x[:, :, 1:], False).flatten().tolist() == [1.5, 3.5]
    assert halve_time(x[:, :, :1], True).flatten().tolist() == [0]
    assert stretch_time(x[:, :, :3], 5, True).flatten().tolist() == [0, 1, 1, 2, 2]
    assert stretch_time(x[:, :, :3], 9, True).flatten().tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert stretch_time(x[:, :, :2], 8, False).flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert stretch_time(x[:, :, :1], 1, True).flatten().tolist() == [0]


# ---- quick forms equal plain ones


def test_conv_by_frames_equals_conv3d() -> None:
    x, conv = torch.randn(2, 5, 6, 7, 8), nn.Conv3d(5, 4, 3)
    plain = F.conv3d(x, conv.weight, conv.bias, padding=(0, 1, 1))
    torch.testing.assert_close(conv_by_frames(x, conv.weight, conv.bias), plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_conv_by_products_equals_conv3d() -> None:
    x, conv = torch.randn(2, 5, 6, 7, 8), nn.Conv3d(5, 4, 3)
    plain = F.conv3d(x, conv.weight, conv.bias, padding=(0, 1, 1))
    torch.testing.assert_close(conv_by_products(x, conv.weight, conv.bias), plain, atol=1e-5, rtol=1e-5)


def test_convolve_doubled_equals_resize_and_convolution() -> None:
    x, conv = torch.randn(3, 5, 4, 6), nn.Conv2d(5, 7, 3, padding=1)
    plain = conv(F.interpolate(x, scale_factor=2.0))
    torch.testing.assert_close(convolve_doubled(x, conv.weight, conv.bias), plain, atol=1e-5, rtol=1e-5)


def test_modulate_is_the_same_with_and_without_gradients() -> None:
    x, scale, shift = torch.randn(2, 3, 5, 8, 12), torch.randn(2, 3, 5, 2, 3), torch.randn(2, 3, 5, 2, 3)
    spread = [z.repeat_interleave(4, 3).repeat_interleave(4, 4) for z in (scale, shift)]
    torch.testing.assert_close(modulate(x, scale, shift), x * spread[0] + spread[1])
    with torch.no_grad():
        torch.testing.assert_close(modulate(x, scale, shift), x * spread[0] + spread[1])


# ---- training


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 24), (5, 8, 16), (9, 24, 8)])
def test_gradients_reach_every_weight(frames: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    config = replace(TINY, encode_frames=0, decode_latents=0, single_frame="first_piece")
    vae, x = CausalVAE(config), clip(frames, height, width, batch=2).requires_grad_()
    posterior = vae.encode(x)
    y = vae.decode(posterior.sample(torch.randn_like(posterior.mean)))
    assert y.shape == x.shape
    ((y - x).abs().mean() + 1e-3 * posterior.kl()).backward()
    for name, parameter in [*vae.named_parameters(), ("input", x)]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert all(x.grad[:, :, t].abs().max() > 0 for t in range(frames))


def test_first_frame_gradient_is_exact() -> None:
    """The copies of frame 0 in front give their gradient back to it."""
    torch.manual_seed(0)
    conv = CausalConv3d(2, 2).double()
    x = torch.randn(1, 2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: conv(x, ClipContext(keep=False)), x)


def test_bfloat16_autocast(vae: CausalVAE) -> None:
    x = clip(5)
    with torch.autocast("cpu", torch.bfloat16):
        mean = vae.encode(x).mean
        vae.decode(mean).square().mean().backward()
    wanted = vae.encode(x).mean
    assert (mean - wanted).abs().max() < 0.1 * wanted.abs().max()


# ---- posterior and scale


def test_posterior() -> None:
    moments = torch.randn(2, 8, 3, 2, 2)
    moments[0, 4:] = 100.0
    posterior = Posterior.from_moments(moments)
    assert posterior.logvar.max() == 20
    noise = torch.randn(2, 4, 3, 2, 2)
    torch.testing.assert_close(
        posterior.sample(noise), posterior.mean + posterior.logvar.mul(0.5).exp() * noise
    )
    normal = torch.distributions.Normal(posterior.mean, posterior.logvar.mul(0.5).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), kl.sum() / 2)
    assert posterior.mode() is posterior.mean


def test_latent_scale() -> None:
    z, inverted = latents(2), replace(TINY, invert_scale_latents=True)
    torch.testing.assert_close(unscale_latents(scale_latents(z, TINY), TINY), z)
    torch.testing.assert_close(scale_latents(z, inverted), z * 0.7)
    torch.testing.assert_close(scale_image_latents(z, TINY), z * 0.7)
    torch.testing.assert_close(scale_image_latents(z, inverted), z / 0.7)


# ---- tiles and slices


def test_tile_geometry_of_the_released_models() -> None:
    encode, decode = encode_tiles(VAEConfig()), decode_tiles(VAEConfig())
    assert (encode.size, encode.step, encode.blend, encode.keep) == ((240, 360), (200, 288), (5, 9), (25, 36))
    assert (decode.size, decode.step, decode.blend, decode.keep) == ((30, 45), (25, 36), (40, 72), (200, 288))


def test_blend_fades() -> None:
    before, after = torch.zeros(1, 1, 1, 1, 6), torch.ones(1, 1, 1, 1, 6)
    assert blend(before, after, 4, dim=4).flatten().tolist() == [0, 0.25, 0.5, 0.75, 1, 1]
    assert blend(before[..., :2], after, 4, dim=4).flatten().tolist() == [0, 0.5, 1, 1, 1, 1]


@torch.no_grad()
def test_tiles(vae: CausalVAE) -> None:
    small, large = latents(3, 6, 10), latents(3, 9, 17)
    assert torch.equal(vae.decode(small, tiled=True), vae.decode(small))
    tiled, whole = vae.decode(large, tiled=True), vae.decode(large)
    assert tiled.shape == whole.shape == (1, 3, 9, 72, 136)
    assert not torch.allclose(tiled, whole)
    x = clip(1, 72, 136)
    assert vae.encode(x, tiled=True).mean.shape == vae.encode(x).mean.shape == (1, 4, 1, 9, 17)


@torch.no_grad()
def test_slices(vae: CausalVAE) -> None:
    x = clip(5, batch=3)
    torch.testing.assert_close(vae.encode(x, sliced=True).mean, vae.encode(x).mean)
    z = vae.encode(x).mode()
    torch.testing.assert_close(vae.decode(z, sliced=True), vae.decode(z))


# ---- errors


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 16, 16), "got 16 frames; legal are 4k+1, nearest 13 or 17"),
        ((1, 3, 2, 16, 16), "nearest 1 or 5"),
        ((1, 3, 0, 16, 16), "got 0 frames; legal are 4k+1, nearest 1"),
        ((1, 3, 5, 20, 16), "got height 20; legal are multiples of 8, nearest 16 or 24"),
        ((1, 3, 5, 16, 4), "got width 4; legal are multiples of 8, nearest 8"),
        ((1, 4, 5, 16, 16), r"a clip must be [B, 3, T, H, W], got [1, 4, 5, 16, 16]"),
        ((3, 16, 16), r"a clip must be [B, 3, T, H, W], got [3, 16, 16]"),
    ],
)
def test_illegal_clips(vae: CausalVAE, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        vae.encode(torch.zeros(shape))
    assert message in str(error.value)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2, 2), (4, 2, 2, 2), (1, 4, 0, 2, 2)])
def test_illegal_latents(vae: CausalVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="latents must be"):
        vae.decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"widths": (8, 12)}, "multiples of norm_groups=8"),
        ({"temporal_levels": 4}, "temporal_levels must be 0..3, got 4"),
        ({"encode_frames": 6}, "multiple of 4, got 6"),
        ({"decode_latents": 3}, "even, got 3"),
        ({"single_frame": "sometimes"}, "got 'sometimes'"),
    ],
)
def test_illegal_settings(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **setting)


@torch.no_grad()
def test_tiles_of_a_size_that_does_not_divide() -> None:
    """Half of 64 pixels are 4 latents, of which no sixth or fifth can be common to two tiles."""
    config = replace(TINY, sample_size=(64, 64))
    vae = CausalVAE(config).eval()
    for height, width in ((64, 64), (72, 136)):
        x = clip(1, height, width)
        tiled, whole = vae.encode(x, tiled=True).mean, vae.encode(x).mean
        assert tiled.shape == whole.shape == (1, 4, 1, height // 8, width // 8)
        assert vae.decode(whole, tiled=True).shape == vae.decode(whole).shape
    for tiles, factor in ((encode_tiles(config), 8), (decode_tiles(config), 1)):
        assert [step // factor for step in tiles.step] == [3, 3]
