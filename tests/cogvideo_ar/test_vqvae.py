"""The image codec's own behaviour: sizes, errors, the trained codebook, and the objective."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cogvideo_ar.vqvae as vqvae_module
from cogvideo_ar.config import VQVAEConfig
from cogvideo_ar.training.vqvae_objective import (
    VQVAELossWeights,
    output_loss,
    reconstruction_loss,
    vqvae_loss,
    vqvae_step,
)
from cogvideo_ar.vqvae import VQVAE, Quantizer
from shared.losses import edge_weight

TINY = VQVAEConfig(
    base_channels=8,
    encoder_multipliers=(1, 1, 2),
    num_res_blocks=1,
    encoder_out_channels=16,
    codebook_size=24,
    code_dim=6,
    decoder_multipliers=((1, 1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 2)),
    norm_groups=4,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=generator(seed)) * 2 - 1
    return F.interpolate(coarse, size=(height, width), mode="bilinear")


@pytest.fixture
def model() -> VQVAE:
    model = VQVAE(TINY)
    model.init_codebook(images(4), generator())
    return model


@pytest.mark.parametrize("rate", TINY.rates)
@pytest.mark.parametrize("size", [(32, 48), (37, 53)])
def test_sizes_are_floored(model: VQVAE, rate: int, size: tuple[int, int]) -> None:
    codes = model.encode(images(2, *size), rate)
    assert codes.shape == (2, size[0] // rate, size[1] // rate)
    assert codes.dtype == torch.int64
    assert model.decode(codes, rate).shape == (2, 3, *(side // rate * rate for side in size))


def test_training_forward_agrees_with_encode_and_decode(model: VQVAE) -> None:
    pixels = images(2)
    output = model(pixels)
    for rate in TINY.rates:
        codes = model.encode(pixels, rate)
        assert torch.equal(output.codes[rate], codes)
        torch.testing.assert_close(
            output.reconstructions[rate], model.decode(codes, rate), atol=1e-5, rtol=1e-5
        )


def test_one_rate_is_a_part_of_three(model: VQVAE) -> None:
    """A codec built for rate 8 alone has no other decoder; equal weights give equal codes and pixels."""
    alone = VQVAE(replace(TINY, rates=(8,)))
    names = alone.state_dict().keys()
    assert not any(
        "decoders.4." in name or "decoders.16." in name or "downsamplers.1." in name for name in names
    )
    alone.load_state_dict({name: model.state_dict()[name] for name in names})
    codes = model.encode(images(1))
    assert torch.equal(alone.encode(images(1)), codes)
    assert torch.equal(alone.decode(codes), model.decode(codes))


def test_quirk_vqvae_attention_level(model: VQVAE) -> None:
    with_attention = {
        name.rpartition(".attn.")[0] for name, _ in model.named_parameters() if ".attn." in name
    }
    assert with_attention == {"decoders.16.up.4"}


def test_without_quantisation_there_is_a_gradient_and_no_codebook(model: VQVAE) -> None:
    pixels = images(1)
    unquantized = model.reconstruct_unquantized(pixels, 8)
    unquantized.square().sum().backward()
    assert unquantized.shape == pixels.shape
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    torch.nn.init.normal_(model.quantizer.codebook)
    torch.testing.assert_close(model.reconstruct_unquantized(pixels, 8), unquantized)


def test_decoded_pixels_are_not_clamped(model: VQVAE) -> None:
    with torch.no_grad():
        model.decoders["8"].conv_out.weight.mul_(100)
    assert model.decode(model.encode(images(1))).abs().max() > 1.5


def test_batch_and_memory_format_do_not_matter(model: VQVAE) -> None:
    pixels = images(3)
    codes = model.encode(pixels)
    single = torch.cat([model.encode(part) for part in pixels.split(1)])
    last = model.to(memory_format=torch.channels_last).encode(pixels.to(memory_format=torch.channels_last))
    assert torch.equal(codes, single)
    assert torch.equal(codes, last)


def test_nearest_code_search_is_exact_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = Quantizer(TINY)
    z = torch.randn(2, TINY.code_dim, 5, 3, generator=generator())
    torch.nn.init.normal_(quantizer.codebook)
    distances = (z.permute(0, 2, 3, 1)[..., None, :] - quantizer.codebook).square().sum(-1)
    assert torch.equal(quantizer.nearest(z), distances.argmin(-1))
    monkeypatch.setattr(vqvae_module, "DISTANCES_PER_CHUNK", 4 * TINY.codebook_size)
    assert torch.equal(quantizer.nearest(z), distances.argmin(-1))


def test_half_precision_codes_are_searched_in_float32() -> None:
    quantizer = Quantizer(TINY).half()
    with torch.no_grad():
        quantizer.codebook.copy_(
            torch.linspace(300, 310, TINY.codebook_size)[:, None]
        )  # squares overflow float16
    z = quantizer.codebook[[3, 20]].T.reshape(1, TINY.code_dim, 1, 2)
    assert quantizer.nearest(z).flatten().tolist() == [3, 20]


def test_moving_average_follows_the_rule() -> None:
    quantizer, decay, eps = Quantizer(TINY), 0.9, 1e-5
    z = torch.randn(1, TINY.code_dim, 4, 4, generator=generator())
    codes = torch.randint(TINY.codebook_size, (1, 4, 4), generator=generator(1))
    before = quantizer.codebook.detach().clone()
    assert quantizer.ema_update(z, codes, decay=decay, eps=eps) == 0
    flat_z, flat_codes = z.permute(0, 2, 3, 1).reshape(16, -1), codes.flatten()
    counts = torch.full((TINY.codebook_size,), decay)
    sums = decay * before
    for vector, code in zip(flat_z, flat_codes, strict=True):
        counts[code] += 1 - decay
        sums[code] += (1 - decay) * vector
    smoothed = (counts + eps) / (counts.sum() + eps * TINY.codebook_size) * counts.sum()
    torch.testing.assert_close(quantizer.code_counts, counts)
    torch.testing.assert_close(quantizer.codebook.detach(), sums / smoothed[:, None])


def test_moving_average_reaches_the_means() -> None:
    quantizer = Quantizer(TINY)
    z = torch.randn(1, TINY.code_dim, 6, 4, generator=generator())
    codes = torch.arange(TINY.codebook_size).reshape(1, 6, 4)
    for _ in range(40):
        quantizer.ema_update(z, codes, decay=0.5)
    torch.testing.assert_close(quantizer.lookup(codes), z, atol=1e-3, rtol=1e-3)


def test_dead_codes_start_again_from_the_data() -> None:
    quantizer = Quantizer(TINY)
    z = torch.randn(1, TINY.code_dim, 4, 4, generator=generator())
    codes = torch.zeros(1, 4, 4, dtype=torch.long)  # only code 0 is ever chosen
    assert quantizer.ema_update(z, codes, decay=0.0, generator=generator()) == TINY.codebook_size - 1
    rows = z.permute(0, 2, 3, 1).reshape(16, -1)
    assert (quantizer.codebook[1:, None] == rows).all(-1).any(1).all()
    assert quantizer.code_counts.min() > 0.5 * quantizer.code_counts.mean() / TINY.codebook_size
    twin = Quantizer(TINY)
    twin.ema_update(z, codes, decay=0.0, generator=generator())
    assert torch.equal(twin.codebook[1:], quantizer.codebook[1:])  # the generator alone decides


def test_codes_start_again_where_the_error_is() -> None:
    quantizer = Quantizer(TINY)
    torch.nn.init.zeros_(quantizer.codebook)
    z = torch.zeros(1, TINY.code_dim, 4, 4)
    z[..., 1, 2] = 3.0  # the only position that the codebook of zeros does not meet
    quantizer.ema_update(z, torch.zeros(1, 4, 4, dtype=torch.long), decay=0.0, generator=generator())
    assert (quantizer.codebook[1:] == 3).all()


@pytest.mark.parametrize("grid", [2, 8])
def test_codebook_starts_from_data(grid: int) -> None:
    """With positions enough every row is one of them; with too few, rows repeat with a little noise."""
    quantizer = Quantizer(TINY)
    z = torch.randn(1, TINY.code_dim, grid, grid, generator=generator())
    quantizer.init_codebook(z, generator())
    rows = z.permute(0, 2, 3, 1).reshape(grid**2, -1)
    far = (quantizer.codebook.detach()[:, None] - rows).square().sum(-1).min(1).values.sqrt().max()
    assert far <= (0 if grid**2 >= TINY.codebook_size else 0.2)
    assert len(quantizer.codebook.unique(dim=0)) == TINY.codebook_size


def test_released_averages_have_to_be_restarted() -> None:
    """icetk's buffers were never updated: an average of zeros would blow the codebook up."""
    quantizer = Quantizer(TINY)
    torch.nn.init.normal_(quantizer.codebook)
    quantizer.code_counts.zero_()
    quantizer.code_sums.zero_()
    quantizer.restart_averages()
    before = quantizer.codebook.detach().clone()
    z = quantizer.lookup(torch.zeros(1, 1, 1, dtype=torch.long)).detach()
    quantizer.ema_update(z, torch.zeros(1, 1, 1, dtype=torch.long))
    torch.testing.assert_close(quantizer.codebook.detach(), before, atol=1e-3, rtol=1e-3)


def test_codebook_gets_its_gradient_only_where_asked() -> None:
    for update, learns in (("ema", False), ("gradient", True)):
        model = VQVAE(replace(TINY, codebook_update=update, rates=(8,)))
        model(images(1)).commitment_loss.backward()
        assert (model.quantizer.codebook.grad is not None) == learns


def test_loss_is_the_sum_of_its_parts(model: VQVAE) -> None:
    weights = VQVAELossWeights(l1=0.5, mse=2.0, commitment=0.1, perceptual=3.0)
    pixels = images(2, 36, 36)  # no multiple of any rate but 4

    def perceptual(got: Tensor, target: Tensor) -> Tensor:
        assert got.shape == target.shape
        return (got.mean() - target.mean()).abs()

    loss, logs = vqvae_loss(model, pixels, weights=weights, perceptual=perceptual)
    parts = [getattr(weights, name) * logs[name] for name in ("l1", "mse", "commitment", "perceptual")]
    torch.testing.assert_close(loss.detach(), torch.stack(parts).sum())
    crops = {rate: pixels[..., : 36 // rate * rate, : 36 // rate * rate] for rate in TINY.rates}
    output = model(pixels)
    by_hand = sum(F.mse_loss(output.reconstructions[rate], crop) for rate, crop in crops.items())
    torch.testing.assert_close(logs["mse"], by_hand.detach())
    assert "perceptual" not in output_loss(output, pixels)[1]


def test_pixel_weights_weigh_both_differences(model: VQVAE) -> None:
    """And without a codebook there is the reconstruction's part alone."""
    pixels = images(2)
    weight = edge_weight(pixels)
    rebuilt = model.reconstruct_unquantized(pixels, 8)
    difference = rebuilt - pixels
    wanted = (weight * (difference.abs() + difference.square())).mean()
    loss, logs = reconstruction_loss({8: rebuilt}, pixels, pixel_weight=weight)
    torch.testing.assert_close(loss, wanted)
    assert logs.keys() == {"l1", "mse", "psnr"}
    ones = torch.ones_like(weight)
    torch.testing.assert_close(vqvae_loss(model, pixels, pixel_weight=ones), vqvae_loss(model, pixels))


def test_psnr_is_that_of_the_reconstruction(model: VQVAE) -> None:
    output = model(images(1))
    target = output.reconstructions[8].detach().clamp(-1, 1)
    off = output._replace(reconstructions={8: target + 0.02 * (target < 0) - 0.02 * (target >= 0)})
    assert output_loss(off, target)[1]["psnr"].item() == pytest.approx(40.0, abs=0.01)  # 0.02 of a range of 2


def test_training_lowers_the_loss() -> None:
    model = VQVAE(replace(TINY, rates=(8,)))
    pixels, draws = images(8), generator()
    model.init_codebook(pixels, draws)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(40):
        loss, logs = vqvae_step(model, pixels, generator=draws, decay=0.9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(logs["l1"]))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(torch.zeros(3, 32, 32)), "shape"),
        (lambda m: m.encode(torch.zeros(1, 4, 32, 32)), "shape"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "uint8"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32), 32), "rate must be one of"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 7)), "7x32 image is too small for rate 8"),
        (lambda m: m.decode(torch.zeros(1, 4, 4)), "integers"),
        (lambda m: m.decode(torch.zeros(1, 16, dtype=torch.long)), "integers"),
        (lambda m: m.decode(torch.full((1, 2, 2), 24)), r"0\.\.23"),
        (lambda m: m.decode(torch.full((1, 2, 2), -1)), r"-1\.\."),
    ],
)
def test_illegal_input_is_named(model: VQVAE, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": ()}, "rates"),
        ({"rates": (8, 4)}, "ascending"),
        ({"rates": (32,)}, "rates"),
        ({"decoder_multipliers": ((1, 1, 1, 1, 2), (1, 2), (1, 1, 2))}, "rate 8 needs 4"),
        ({"norm_groups": 3}, "norm_groups 3"),
        ({"codebook_update": "sgd"}, "sgd"),
    ],
)
def test_illegal_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
