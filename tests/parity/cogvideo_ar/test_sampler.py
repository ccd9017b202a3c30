"""The two-step draw against upstream's class: exact probabilities, and draws that follow them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo_ar.sampling import CogLMSampler
from tests.parity.recorded import case_folder, read_json, read_tensors

pytestmark = pytest.mark.parity
SPEC_CASES = {case["name"]: case for case in read_json(case_folder("cogvideo_ar") / "sampler.json")["cases"]}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    folder: Path = case_folder("cogvideo_ar")
    return read_tensors(folder / "sampler.safetensors")


@pytest.fixture(params=SPEC_CASES)
def case(
    request: pytest.FixtureRequest, tensors: dict[str, Tensor]
) -> tuple[CogLMSampler, Tensor, Tensor, Any]:
    """The sampler, logits [B, V], upstream's probabilities [B, V] and the recorded facts."""
    facts, name = SPEC_CASES[request.param], request.param
    if f"{name}.logits" in tensors:
        logits, labels = tensors[f"{name}.logits"], tensors[f"{name}.labels"]
        probabilities = tensors[f"{name}.probs"]
    else:
        logits, labels = tensors[f"{name}.logits_times_16"].float()[None] / 16, tensors["cluster_labels"]
        probabilities = torch.zeros(logits.shape, dtype=torch.float64)
        probabilities[0, tensors[f"{name}.prob_index"].long()] = tensors[f"{name}.prob_value"]
    settings = {key: facts[key] for key in ("temperature", "top_k", "temperature2")}
    sampler = CogLMSampler(labels, **settings, invalid=[tuple(part) for part in facts["invalid_slices"]])
    return sampler, logits, probabilities, facts


def test_probabilities_are_upstreams(case: tuple[CogLMSampler, Tensor, Tensor, Any]) -> None:
    sampler, logits, expected, _ = case
    got = sampler.probabilities(logits)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(got > 0, expected > 0)


def test_draws_follow_the_probabilities(case: tuple[CogLMSampler, Tensor, Tensor, Any]) -> None:
    """As many draws as were recorded, or as few as stay quick."""
    sampler, logits, expected, facts = case
    draws = min(facts["samples"], 2**26 // facts["vocab"], 40000)
    generator = torch.Generator().manual_seed(0)
    for row, probability in zip(logits, expected, strict=True):
        counts = torch.zeros(len(row), dtype=torch.long)
        for uniforms in torch.rand(draws, 2, generator=generator, dtype=torch.float64).split(
            2**21 // len(row)
        ):
            tokens = sampler.sample(row.expand(len(uniforms), -1), uniforms)
            counts += tokens.bincount(minlength=len(row))
        distance = (counts / draws - probability).abs().sum() / 2
        # the mean total variation of an exact multinomial is about sum sqrt(p(1-p)/n) / sqrt(2 pi)
        typical = (probability * (1 - probability) / draws).sqrt().sum() / (2 * torch.pi) ** 0.5
        assert counts[probability == 0].sum() == 0
        assert distance < 1.6 * typical, f"{distance:.4f} where an exact draw gives about {typical:.4f}"
