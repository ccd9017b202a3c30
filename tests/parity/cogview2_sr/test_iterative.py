"""Iterative super-resolution against upstream, pass by pass from the recorded pass before."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from cogvideo_ar.generation import GreedySampler
from cogvideo_ar.super_resolution.iterative import (
    LEVEL_TILE,
    TopKSampler,
    build_pass_samplers,
    cell_levels,
    iterative_hidden,
    iterative_inputs,
    refine_frames,
    refine_pass,
)
from tests.parity.cogview2_sr.models import case_config, case_model, cases, facts, texts_of

pytestmark = pytest.mark.parity
LOGITS = 1e-4
NUM_PASSES = len(facts()["itersr"]["topk_per_step"])


def masked_input(number: int) -> Tensor:
    """What upstream feeds in pass `number` (from 1)."""
    config, recorded = case_config("itersr"), cases()
    before = recorded["itersr.image_in" if number == 1 else f"itersr.step{number - 1}_tokens_out"]
    return before.masked_fill(cell_levels(config.fine_grid) >= number, config.start_of_image)


def hidden_of(tokens: Tensor, log_weights: Tensor | None = None) -> Tensor:
    texts = texts_of(cases()["itersr.text"][: len(tokens)])
    with torch.inference_mode():
        inputs = iterative_inputs(case_config("itersr"), texts, tokens)
        return iterative_hidden(case_model("itersr"), inputs, log_weights_T=log_weights)


def test_levels_and_settings() -> None:
    known, config = facts()["itersr"], case_config("itersr")
    assert torch.equal(torch.tensor(LEVEL_TILE), cases()["itersr.level_tile"])
    levels = cell_levels(config.fine_grid)
    assert [int((levels > number).sum()) for number in range(NUM_PASSES)] == known["masked_per_step"]
    assert int((torch.tensor(LEVEL_TILE) <= 0).sum()) == known["never_masked_per_tile"]
    assert [sampler.top_k for sampler in build_pass_samplers(config)] == known["topk_per_step"]


def test_inputs_are_as_fed() -> None:
    config, recorded = case_config("itersr"), cases()
    inputs = iterative_inputs(config, texts_of(recorded["itersr.text"]), masked_input(1))
    extra = torch.arange(config.fine_len) + config.num_positions
    assert torch.equal(torch.cat([inputs.positions[0], extra]), recorded["itersr.position_ids"])
    assert (~inputs.text_valid).sum(1).tolist() == [facts()["itersr"]["n_pad"]] * len(inputs.tokens)


def test_first_pass_hidden_states_and_logits() -> None:
    recorded, model, blocks = cases(), case_model("itersr"), []
    hooks = [block.register_forward_hook(lambda *args: blocks.append(args[2])) for block in model.blocks]
    logits = model.image_logits(hidden_of(masked_input(1)))
    for hook in hooks:
        hook.remove()
    sel = recorded["itersr.sel"]
    for layer, hidden in enumerate(blocks):
        expected = recorded[f"itersr.step1_hidden{layer}_sel"]
        torch.testing.assert_close(hidden[:, sel], expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits[:, sel], recorded["itersr.step1_logits_sel"], atol=LOGITS, rtol=0)
    torch.testing.assert_close(logits.logsumexp(2), recorded["itersr.step1_logsumexp"], atol=LOGITS, rtol=0)


def test_last_pass_logits() -> None:
    logits = case_model("itersr").image_logits(hidden_of(masked_input(NUM_PASSES)))
    expected = cases()[f"itersr.step{NUM_PASSES}_logsumexp"]
    torch.testing.assert_close(logits.logsumexp(2), expected, atol=LOGITS, rtol=0)


def test_log_weights() -> None:
    """Zeros on the pads, then a ramp over the text; batch item 0."""
    recorded, config, num_pad = cases(), case_config("itersr"), facts()["itersr"]["n_pad"]
    weights = torch.zeros(config.text_len)
    words = facts()["itersr"]["extra"]["log_attention_weights"]
    start, end = map(float, re.search(r"linspace\((-?[\d.]+),(-?[\d.]+)", words).groups())
    weights[num_pad:] = torch.linspace(start, end, config.text_len - num_pad)
    hidden = hidden_of(masked_input(1)[:1], weights)
    logits = case_model("itersr").image_logits(hidden[:, recorded["itersr.sel"]])
    torch.testing.assert_close(logits, recorded["itersr_extra.logits_sel"], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("number", range(1, NUM_PASSES + 1))
def test_greedy_pass(number: int) -> None:
    recorded, config = cases(), case_config("itersr")
    before = recorded["itersr.image_in" if number == 1 else f"itersr.step{number - 1}_tokens_out"]
    again = (cell_levels(config.fine_grid) >= number).expand_as(before)
    uniforms = torch.zeros(*before.shape, 2, dtype=torch.float64)
    tokens = refine_pass(
        case_model("itersr"), texts_of(recorded["itersr.text"]), before, again, GreedySampler(), uniforms
    )
    clear = ~recorded[f"itersr.step{number}_ambiguous"]
    assert torch.equal(tokens[clear], recorded[f"itersr.step{number}_tokens_out"][clear])
    assert torch.equal(tokens[~again], before[~again])


def refined(cells: Tensor | None) -> tuple[Tensor, Tensor]:
    """Greedy tokens of all passes, and the image before them."""
    recorded, config = cases(), case_config("itersr")
    before = recorded["itersr.image_in"]
    kept = before.clone()
    uniforms = torch.zeros(len(before), NUM_PASSES, config.fine_len, 2, dtype=torch.float64)
    texts, samplers = texts_of(recorded["itersr.text"]), [GreedySampler()] * NUM_PASSES
    tokens = refine_frames(case_model("itersr"), texts, before, samplers, uniforms, cells_S=cells)
    assert torch.equal(before, kept), "the caller's image is not touched"
    return tokens, before


def test_all_passes() -> None:
    tokens, before = refined(None)
    if not any(bool(cases()[f"itersr.step{i}_ambiguous"].any()) for i in range(1, NUM_PASSES + 1)):
        assert torch.equal(tokens, cases()["itersr.final_tokens"])
    assert (tokens == cases()["itersr.final_tokens"]).float().mean() > 0.99
    levels = cell_levels(case_config("itersr").fine_grid)
    assert torch.equal(tokens[:, levels <= 0], before[:, levels <= 0])


def test_input_mask() -> None:
    rows, columns = case_config("itersr").fine_grid
    cells = torch.zeros(rows, columns, dtype=torch.bool)
    (top, bottom), (left, right) = re.findall(r"(\d+)\.\.(\d+)", facts()["itersr"]["input_mask_case"]["mask"])
    cells[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = True
    tokens, before = refined(cells.flatten())
    assert torch.equal(tokens, cases()["itersr_masked.final_tokens"])
    changed = (tokens != before).view(-1, rows, columns)
    known = facts()["itersr"]["input_mask_case"]
    assert int(changed[:, ~cells].sum()) == known["changed_outside"]
    assert int(changed[:, cells].sum()) == known["changed_inside"]


def test_sampling_distribution() -> None:
    recorded = cases()
    (name,) = [name for name in recorded if name.startswith("strategy.iter_top")]
    top_k = int(name.removeprefix("strategy.iter_top").removesuffix("_probs"))
    got, expected = TopKSampler(top_k).probabilities(recorded["strategy.logits"]), recorded[name]
    torch.testing.assert_close(got.float(), expected, atol=1e-6, rtol=1e-5)
    assert (got > 0).sum(1).tolist() == [top_k] * len(got)
