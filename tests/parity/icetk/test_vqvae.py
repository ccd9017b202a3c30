"""The image codec against icetk 0.0.7: ids, images, encoder outputs, losses, gradients, released names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo_ar.checkpoints import ICETK_VQVAE
from cogvideo_ar.config import VQVAEConfig
from cogvideo_ar.vqvae import VQVAE, Quantizer
from shared.checkpoints import convert, invert, load_into
from tests.parity.recorded import case_folder, read_json, read_tensors

pytestmark = pytest.mark.parity
FOLDER: Path = case_folder("icetk")
FACTS: dict[str, Any] = read_json(FOLDER / "vqvae_cases.json")
IMAGE_ATOL = 2e-5  # of icetk's 0..1 range; ids must be exact
IMAGE_CASES = [
    (name, level) for name, case in FACTS["cases"].items() for level in case if level.startswith("l")
]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return read_tensors(FOLDER / "vqvae_cases.safetensors")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {k: v.float() for k, v in read_tensors(FOLDER / "vqvae_weights.safetensors").items()}


@pytest.fixture(scope="module")
def model(weights: dict[str, Tensor]) -> VQVAE:
    return load_into(VQVAE(recorded_config()), convert(weights, ICETK_VQVAE)).eval()


def recorded_config() -> VQVAEConfig:
    recorded = FACTS["config"]
    return VQVAEConfig(
        base_channels=recorded["channels"],
        encoder_multipliers=tuple(recorded["enc_mult"]),
        num_res_blocks=recorded["enc_res_blocks"],
        encoder_out_channels=recorded["hidden_dim"],
        codebook_size=recorded["n_embed"],
        code_dim=recorded["embedding_dim"],
        decoder_multipliers=tuple(tuple(part) for part in recorded["dec_mults"]),
        commitment_cost=recorded["commitment_cost"],
    )


def pixels_of(image_u8: Tensor) -> Tensor:
    return image_u8.float() / 127.5 - 1


def unit_range(pixels: Tensor) -> Tensor:
    """-1..1 -> icetk's 0..1."""
    return (pixels + 1) / 2


def normalised(pixels: Tensor, config: VQVAEConfig) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.pixel_mean, config.pixel_std))
    return (unit_range(pixels) - mean) / std


@pytest.mark.parametrize(("name", "level"), IMAGE_CASES)
def test_ids_and_images(model: VQVAE, tensors: dict[str, Tensor], name: str, level: str) -> None:
    rate = FACTS["cases"][name][level]["compress_rate"]
    ids = model.encode(pixels_of(tensors[f"{name}.image_u8"]), rate)
    assert torch.equal(ids, tensors[f"{name}.{level}.ids"].long())
    decoded = unit_range(model.decode(ids, rate))
    torch.testing.assert_close(decoded, tensors[f"{name}.{level}.decoded"], atol=IMAGE_ATOL, rtol=0)


@pytest.mark.parametrize(("name", "level"), IMAGE_CASES)
def test_encoder_and_quantiser_outputs(
    model: VQVAE, tensors: dict[str, Tensor], name: str, level: str
) -> None:
    facts = FACTS["cases"][name][level]
    rate = facts["compress_rate"]
    with torch.no_grad():
        features = model.features(pixels_of(tensors[f"{name}.image_u8"]), rate)[rate]
        quantized = model.quantizer(features)
    assert quantized.loss.item() == pytest.approx(facts["commit_diff"], rel=1e-5)
    if f"{name}.{level}.enc_out" in tensors:
        torch.testing.assert_close(features, tensors[f"{name}.{level}.enc_out"], atol=2e-5, rtol=0)
        z_q = quantized.z_q.permute(0, 2, 3, 1)  # [B, D, h, w] -> [B, h, w, D]
        torch.testing.assert_close(z_q, tensors[f"{name}.{level}.quant_bhwc"], atol=2e-5, rtol=0)


def test_normalisation(model: VQVAE, tensors: dict[str, Tensor]) -> None:
    for name in FACTS["cases"]:
        if f"{name}.normalised" in tensors:
            got = normalised(pixels_of(tensors[f"{name}.image_u8"]), model.config)
            torch.testing.assert_close(got, tensors[f"{name}.normalised"], atol=2e-6, rtol=0)


def test_ids_of_resized_images(model: VQVAE, tensors: dict[str, Tensor]) -> None:
    """The stored resized images, so that only the codec is compared, not a resize."""
    for key, ids in tensors.items():
        if not key.startswith("pil.ids_rate"):
            continue
        rate, _, antialias = key.removeprefix("pil.ids_rate").partition("_antialias_")
        image = tensors[f"pil.resized_antialias_{antialias or 'true'}"]
        got = model.encode(pixels_of(image)[None], int(rate))
        assert torch.equal(got.flatten(1), ids.long()), key


def test_training_forward_and_gradients(model: VQVAE, tensors: dict[str, Tensor]) -> None:
    """Recorded loss: squared error of the three normalised reconstructions plus the quantiser's loss."""
    recorded, pixels = FACTS["training"], pixels_of(tensors["square.image_u8"])
    model.zero_grad()
    output = model(pixels)
    target = normalised(pixels, model.config)
    errors = [(normalised(x, model.config) - target).square().mean() for x in output.reconstructions.values()]
    loss = torch.stack(errors).sum() + output.commitment_loss
    loss.backward()
    assert loss.item() == pytest.approx(recorded["loss"], rel=1e-5)
    assert output.commitment_loss.item() == pytest.approx(recorded["total_diff"], rel=1e-5)
    gradients = upstream_gradients(model)
    without = [name for name, gradient in gradients.items() if gradient is None]
    assert without == recorded["params_without_grad"]
    for name, norm in recorded["grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    for key in (key for key in tensors if key.startswith("grad.")):
        expected = tensors[key]
        error = (gradients[key.removeprefix("grad.")] - expected).norm() / expected.norm()
        assert error < 2e-5, f"{key}: {error:.1e}"


def upstream_gradients(model: VQVAE) -> dict[str, Any]:
    """Gradients (or None) by upstream's parameter names."""
    parameters = dict(model.named_parameters())
    marks = {name: torch.tensor(float(i)) for i, name in enumerate(parameters)}
    back = invert(marks, ICETK_VQVAE)
    ours = list(parameters.values())
    return {name: ours[int(mark)].grad for name, mark in back.items()}


def test_quantiser_trained_by_gradient(tensors: dict[str, Tensor]) -> None:
    """icetk's other quantiser (`VectorQuantize`), whose codebook learns from the loss."""
    recorded = {key.removeprefix("vq_plain."): x for key, x in tensors.items() if key.startswith("vq_plain.")}
    (size, dim), channels = recorded["embed.weight"].shape, recorded["z"].shape[1]
    config = replace(
        recorded_config(),
        encoder_out_channels=channels,
        codebook_size=size,
        code_dim=dim,
        commitment_cost=FACTS["vq_plain"]["commitment_cost"],
        codebook_update="gradient",
    )
    quantizer = Quantizer(config)
    with torch.no_grad():
        quantizer.codebook.copy_(recorded["embed.weight"])
        quantizer.proj.weight.copy_(recorded["proj.weight"])
        quantizer.proj.bias.copy_(recorded["proj.bias"])
    z = recorded["z"].clone().requires_grad_()
    result = quantizer(z)
    assert torch.equal(result.codes, recorded["ids"].long())
    assert result.loss.item() == pytest.approx(FACTS["vq_plain"]["diff"], rel=1e-5)
    torch.testing.assert_close(result.z_q.permute(0, 2, 3, 1), recorded["zq_bhwc"], atol=1e-6, rtol=0)
    (0.5 * result.z_q.sum() + result.loss).backward()
    for gradient, name in (
        (z.grad, "z"),
        (quantizer.codebook.grad, "embed.weight"),
        (quantizer.proj.weight.grad, "proj.weight"),
        (quantizer.proj.bias.grad, "proj.bias"),
    ):
        torch.testing.assert_close(gradient, recorded[f"grad.{name}"], atol=1e-5, rtol=1e-5)


def test_image_too_small_is_refused(model: VQVAE) -> None:
    """Where upstream fails, so do we (in words); the smallest legal image gives one code."""
    rate = max(model.config.rates)
    assert model.encode(torch.zeros(1, 3, rate, rate), rate).shape == (1, 1, 1)
    with pytest.raises(ValueError, match="too small"):
        model.encode(torch.zeros(1, 3, rate // 2, rate // 2), rate)


def test_table_there_and_back(weights: dict[str, Tensor]) -> None:
    back = invert(convert(weights, ICETK_VQVAE), ICETK_VQVAE)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_full_size_manifest() -> None:
    manifest = read_json(FOLDER / "vqvae_full_manifest.json")
    with torch.device("meta"):
        model = VQVAE(VQVAEConfig())
    entries = {entry["name"]: tuple(entry["shape"]) for entry in manifest["entries"]}
    ours = {name: tuple(x.shape) for name, x in invert(model.state_dict(), ICETK_VQVAE).items()}
    assert ours == entries
    assert sum(p.numel() for p in model.parameters()) == manifest["total_parameters"]
    parameters = {entry["name"] for entry in manifest["entries"] if entry["kind"] == "parameter"}
    assert invert(dict(model.named_parameters()), ICETK_VQVAE).keys() == parameters
