"""Direct super-resolution against upstream: logits, hidden states, whole grids of greedy tokens, sampling."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from torch import Tensor

from cogvideo_ar.super_resolution.direct import (
    Inputs,
    build_direct_sampler,
    check_texts,
    direct_hidden,
    direct_inputs,
    enlarge_frames,
)
from shared.errors import SettingError
from tests.parity.cogview2_sr.models import (
    case_config,
    case_model,
    cases,
    facts,
    greedy_clusters,
    texts_of,
)

pytestmark = pytest.mark.parity
LOGITS = 1e-4  # absolute; the recorded float32 logits are within 1.4e-5 of float64


def case_inputs(rows: slice = slice(None)) -> Inputs:
    recorded = cases()
    return direct_inputs(
        case_config("dsr"), texts_of(recorded["dsr.text"][rows]), recorded["dsr.low_tokens"][rows]
    )


@cache
def run() -> tuple[list[Tensor], Tensor]:
    """Outputs of every block, and the last hidden states."""
    model, blocks = case_model("dsr"), []
    hooks = [block.register_forward_hook(lambda *args: blocks.append(args[2])) for block in model.blocks]
    with torch.inference_mode():
        hidden = direct_hidden(model, case_inputs())
    for hook in hooks:
        hook.remove()
    return blocks, hidden


def test_inputs_are_as_fed() -> None:
    inputs, recorded, config = case_inputs(), cases(), case_config("dsr")
    assert torch.equal(inputs.tokens, recorded["dsr.model_tokens"])
    extra = torch.arange(config.fine_len) + config.num_positions
    for row in inputs.positions:
        assert torch.equal(torch.cat([row, extra]), recorded["dsr.position_ids"])
    assert (~inputs.text_valid).sum(1).tolist() == [facts()["dsr"]["n_pad"]] * len(inputs.tokens)


def test_hidden_states() -> None:
    blocks, _ = run()
    recorded = cases()
    for layer, hidden in enumerate(blocks):
        expected = recorded[f"dsr.hidden{layer}_sel"]
        torch.testing.assert_close(hidden[:, recorded["dsr.sel"]], expected, atol=2e-5, rtol=1e-5)
    assert f"dsr.hidden{len(blocks)}_sel" not in recorded


def test_logits() -> None:
    recorded, logits = cases(), case_model("dsr").image_logits(run()[1])
    torch.testing.assert_close(
        logits[:, recorded["dsr.sel"]], recorded["dsr.logits_sel"], atol=LOGITS, rtol=0
    )
    torch.testing.assert_close(logits.logsumexp(2), recorded["dsr.logsumexp"], atol=LOGITS, rtol=0)
    assert torch.equal(logits.argmax(2), recorded["dsr.argmax"])


def test_log_weights_and_scalar() -> None:
    """The weights that the json describes in words, batch item 0."""
    recorded, config, model = cases(), case_config("dsr"), case_model("dsr")
    text, num_pad = config.text_len, facts()["dsr"]["n_pad"]
    weights = torch.zeros((text + config.coarse_len,) * 2)
    words = facts()["dsr"]["extra"]["log_attention_weights"]
    coarse_to_text, text_to_text = map(float, re.findall(r"= (-?[\d.]+)", words))
    weights[text:, num_pad:text] = coarse_to_text
    weights[num_pad:text, num_pad:text] = text_to_text
    scalar = facts()["dsr"]["extra"]["add_scalar"]
    with torch.inference_mode():
        hidden = direct_hidden(model, case_inputs(slice(0, 1)), log_weights_PP=weights, coarse_weight=scalar)
        logits = model.image_logits(hidden[:, recorded["dsr.sel"]])
    torch.testing.assert_close(logits, recorded["dsr_extra.logits_sel"], atol=LOGITS, rtol=0)


def test_whole_grids_of_greedy_tokens() -> None:
    recorded, config = cases(), case_config("dsr")
    sampler = greedy_clusters(recorded["cluster_labels"][: config.num_image_tokens])
    coarse = recorded["dsr.low_tokens"]
    uniforms = torch.zeros(len(coarse), config.fine_len, 2, dtype=torch.float64)
    tokens = enlarge_frames(case_model("dsr"), texts_of(recorded["dsr.text"]), coarse, sampler, uniforms)
    clear = ~recorded["dsr.greedy_ambiguous"]
    assert torch.equal(tokens[clear], recorded["dsr.greedy_tokens"][clear])
    plain = case_model("dsr").image_logits(run()[1][:, -config.fine_len :]).argmax(2)
    assert int((plain != tokens).sum()) == facts()["dsr"]["greedy_differs_from_plain_argmax"]


def test_sampling_distribution() -> None:
    recorded, config = cases(), case_config("dsr")
    sampler = build_direct_sampler(config, recorded["cluster_labels"][: config.num_image_tokens])
    got, expected = sampler.probabilities(recorded["strategy.logits"]), recorded["strategy.dsr_probs"]
    torch.testing.assert_close(got.float(), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(got > 1e-30, expected > 1e-30)


def test_sampling_distribution_with_the_released_clusters() -> None:
    recorded, known = cases(), facts()["strategy_full"]
    logits = recorded["strategy_full.logits_f16"].float()
    draw = build_direct_sampler(case_config("dsr"), recorded["real_cluster_labels_20000"])
    assert draw.top_k == known["topk_clusters"]
    got = draw.probabilities(logits)
    top = recorded["strategy_full.top_ids"]
    torch.testing.assert_close(
        got.gather(1, top).float(), recorded["strategy_full.top_probs"], atol=1e-6, rtol=1e-5
    )
    assert (got > 0).sum(1).tolist() == known["support_size"]
    masses = torch.zeros(len(logits), int(draw.starts_K1.numel()) - 1, dtype=torch.float64)
    masses.index_add_(1, recorded["real_cluster_labels_20000"], logits.double().softmax(1))
    heaviest = masses.topk(recorded["strategy_full.top7_clusters"].shape[1], dim=1)
    assert torch.equal(heaviest.indices, recorded["strategy_full.top7_clusters"])
    torch.testing.assert_close(
        heaviest.values.float(), recorded["strategy_full.top7_cluster_probs"], atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("length", facts()["dsr"]["text_length_limits"])
def test_text_length_limits(length: str) -> None:
    known, texts = facts()["dsr"]["text_length_limits"][length], [[1] * int(length)]
    if known["ok"]:
        check_texts(case_config("dsr"), texts)
        coarse = torch.zeros(1, case_config("dsr").coarse_len, dtype=torch.long)
        assert int(direct_inputs(case_config("dsr"), texts, coarse).text_valid.sum()) == int(length)
        return
    with pytest.raises(SettingError, match=f"the prompt has {length} tokens"):
        check_texts(case_config("dsr"), texts)
