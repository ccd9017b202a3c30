"""Training forward, loss and gradients against the upstream code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo_ar.checkpoints import SAT_STAGE
from cogvideo_ar.layout import (
    SequenceLayout,
    TrainingBatch,
    interpolation_layout,
    keyframe_layout,
    pad_text,
    text_positions,
    training_batch,
)
from cogvideo_ar.training.objective import frame_losses, masked_mean, token_losses
from cogvideo_ar.transformer import CogVideoTransformer
from shared.checkpoints import invert
from tests.parity.cogvideo_ar.stages import (
    build,
    config_of,
    folder,
    fullvocab_weights,
    special_ids,
    stage_weights,
)
from tests.parity.recorded import read_json, read_tensors

pytestmark = pytest.mark.parity
LAYOUTS = {1: keyframe_layout, 2: interpolation_layout}


def recorded_cases() -> dict[str, Any]:
    return read_json(folder() / "train_cases.json")


def batch_of(rows: Tensor, model: CogVideoTransformer, stage: int, text_len: int) -> TrainingBatch:
    """Dataset rows -> batch: padding goes, the text is cut and padded on the left."""
    config = model.config
    num_texts = rows.shape[1] - config.num_frames * config.frame_len
    texts = [[t for t in row if t != config.pad_token][:text_len] for row in rows[:, :num_texts].tolist()]
    text, valid = pad_text(texts, config.pad_token, text_len)
    frames = rows[:, num_texts:].long().unflatten(1, (config.num_frames, config.frame_len))
    layout = LAYOUTS[stage](config, text_len)
    return training_batch(layout, text, frames, start_of_image=config.start_of_image, text_valid_BT=valid)


def to_time_order(x_BLX: Tensor, layout: SequenceLayout) -> Tensor:
    """Rows of the model's sequence -> the recorded sequence, whose frames stand in time order."""
    text, slots = x_BLX[:, : layout.text_len], x_BLX[:, layout.frames]
    frames = layout.to_display(slots.unflatten(1, (layout.num_frames, -1)))
    return torch.cat([text, frames.flatten(1, 2)], dim=1)


def load_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor], CogVideoTransformer, TrainingBatch]:
    facts = recorded_cases()
    case, recorded = facts["cases"][name], read_tensors(folder() / f"{name}.safetensors")
    ids, text_len = special_ids(), recorded["sample_attention_mask_totxt"].shape[1]
    frame_len = facts["config"]["layout"][1] - facts["config"]["layout"][0]
    config = config_of(
        facts["config"],
        window=case["window_size"],
        start_of_image=ids["<start_of_image>"],
        frame_len=frame_len,
    )
    model = build(config, stage_weights(case["stage"]), torch.float32)
    batch = batch_of(recorded["dataset_rows"], model, case["stage"], text_len)
    return case, recorded, model, batch


def test_cases_are_there():
    assert recorded_cases()["cases"]


@pytest.mark.parametrize("name", recorded_cases()["cases"])
def test_training_case(name: str):
    case, recorded, model, batch = load_case(name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, parameter in model.temporal_parameters():
        parameter.requires_grad_(True)
    layout = batch.layout
    assert batch.text_valid is not None
    assert torch.equal(to_time_order(batch.tokens, layout), recorded["input_tokens"].long())
    positions = torch.cat(
        [text_positions(batch.text_valid), layout.slot_positions().expand(len(batch.tokens), -1)], dim=1
    )
    assert torch.equal(to_time_order(positions, layout), recorded["position_ids"].long())
    assert torch.equal(batch.text_valid, recorded["sample_attention_mask_totxt"].bool())
    mask = layout.to_display(batch.loss_mask).flatten(1)
    assert torch.equal(mask, recorded["sample_loss_mask"][:, layout.text_len + 1 :].bool())

    hidden = model.hidden(batch.tokens, layout, text_valid_BT=batch.text_valid)
    with torch.no_grad():
        logits = model.logits(to_time_order(hidden, layout)[:, recorded["logits_positions"].long()])
    torch.testing.assert_close(logits, recorded["logits"], atol=1e-4, rtol=0)

    losses = token_losses(model.image_logits(hidden[:, layout.frames]), batch.labels)
    shown = layout.to_display(losses.detach()).flatten(1)
    torch.testing.assert_close(shown, recorded["token_losses"], atol=1e-4, rtol=0)
    prefix = {1: "AR", 2: "ITP"}[case["stage"]]
    means = {f"{prefix}_f{time}_loss": float(x) for time, x in frame_losses(losses.detach(), layout).items()}
    for key, value in case["report"]["frame_losses"].items():
        assert means[key] == pytest.approx(value, abs=1e-5)
    loss = masked_mean(losses, batch.loss_mask)
    torch.testing.assert_close(loss[None], recorded["loss"], atol=1e-5, rtol=0)

    loss.backward()
    check_gradients(model, recorded)


def check_gradients(model: CogVideoTransformer, recorded: dict[str, Tensor]) -> None:
    grads = {name: parameter.grad for name, parameter in model.temporal_parameters()}
    upstream = invert(
        {n: torch.zeros_like(p) if grads.get(n) is None else grads[n] for n, p in model.named_parameters()},
        SAT_STAGE,
    )
    checked = 0
    for key, expected in recorded.items():
        if key.startswith("grad."):
            torch.testing.assert_close(upstream[key.removeprefix("grad.")], expected, atol=1e-6, rtol=0)
        elif key.startswith("grad_rows."):
            rows = recorded["grad_position_rows"].long()
            actual = upstream[key.removeprefix("grad_rows.")][rows]
            torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
        else:
            continue
        checked += 1
    assert checked


def fullvocab() -> dict[str, Any]:
    cases = read_json(folder() / "fullvocab.json")
    return {name: case for name, case in cases.items() if "frame_losses" in case}


@pytest.mark.parametrize("name", fullvocab())
@torch.inference_mode()
def test_full_image_vocabulary(name: str):
    """Losses over all image tokens, logits over all rows of the table."""
    case, facts = fullvocab()[name], read_json(folder() / "fullvocab.json")["config"]
    recorded = {
        key.removeprefix(name + "."): tensor
        for key, tensor in read_tensors(folder() / "fullvocab_cases.safetensors").items()
        if key.startswith(name + ".")
    }
    layout_facts = recorded_cases()["config"]["layout"]
    start, first = special_ids()["<start_of_image>"], min(special_ids().values())
    stage = 2 if "stage2" in name else 1
    config = config_of(
        facts,
        window=recorded_cases()["cases"][name]["window_size"],
        start_of_image=start - first + facts["num_image_tokens"],
        frame_len=layout_facts[1] - layout_facts[0],
    )
    model = build(config, fullvocab_weights(), torch.float32)
    batch = batch_of(recorded["dataset_rows"], model, stage, layout_facts[0])
    hidden = model.hidden(batch.tokens, batch.layout, text_valid_BT=batch.text_valid)
    losses = token_losses(model.image_logits(hidden[:, batch.layout.frames]), batch.labels)
    shown = batch.layout.to_display(losses).flatten(1)
    torch.testing.assert_close(shown, recorded["token_losses"], atol=1e-4, rtol=0)
    assert float(masked_mean(losses, batch.loss_mask)) == pytest.approx(case["loss"], abs=1e-5)

    logits = model.logits(to_time_order(hidden, batch.layout)[0, recorded["logits_positions"].long()])
    first_rows, text_rows = recorded["logits_first256"], recorded["logits_text_rows"]
    torch.testing.assert_close(logits[:, : first_rows.shape[1]], first_rows, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[:, -text_rows.shape[1] :], text_rows, atol=1e-4, rtol=0)
    top = logits.gather(1, recorded["logits_top8_index"].long())
    torch.testing.assert_close(top, recorded["logits_top8_value"], atol=1e-4, rtol=0)
    sums = logits.double().logsumexp(1), logits[:, : config.num_image_tokens].double().logsumexp(1)
    torch.testing.assert_close(sums[0], recorded["logits_lse_all_rows"], atol=1e-5, rtol=0)
    torch.testing.assert_close(sums[1], recorded["logits_lse_image_rows"], atol=1e-5, rtol=0)
