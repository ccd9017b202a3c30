"""Cached generation against the upstream code: greedy tokens in float64 (in float32 a few steps are too
close to call), logits of the recorded steps, and the prefill with its oddities."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo_ar.attention import FullAttention
from cogvideo_ar.config import PromptTemplates
from cogvideo_ar.generation import generate_tokens
from cogvideo_ar.interpolation import merge_blocks
from cogvideo_ar.layout import (
    SequenceLayout,
    image_layout,
    interpolation_layout,
    keyframe_layout,
    prompt_tokens,
)
from cogvideo_ar.transformer import CogVideoTransformer
from tests.parity.cogvideo_ar.stages import (
    TableTokenizer,
    build,
    config_of,
    folder,
    fullvocab_weights,
    special_ids,
    stage_weights,
)
from tests.parity.recorded import read_json, read_tensors

pytestmark = pytest.mark.parity


@cache
def facts() -> dict[str, Any]:
    return read_json(folder() / "inference_cases.json")


@cache
def tensors() -> dict[str, Tensor]:
    return read_tensors(folder() / "inference_cases.safetensors")


def case_names() -> list[str]:
    return [name for name, fact in facts().items() if "call" in fact]


@cache
def model_of(stage: int) -> CogVideoTransformer:
    recorded = read_json(folder() / "train_cases.json")
    window = max(case["window_size"] for case in recorded["cases"].values()) if stage == 2 else 0
    layout = recorded["config"]["layout"]
    start = special_ids()["<start_of_image>"]
    config = config_of(
        recorded["config"], window=window, start_of_image=start, frame_len=layout[1] - layout[0]
    )
    return build(config, stage_weights(stage), torch.float64)


def split_case(seq: Tensor, text_len: int, frame_len: int) -> tuple[list[list[int]], Tensor]:
    """Recorded rows `text | start-of-image | frames` -> texts and frames [B, F, S]."""
    return seq[:, :text_len].tolist(), seq[:, text_len + 1 :].long().unflatten(1, (-1, frame_len))


def layout_of(model: CogVideoTransformer, call: dict[str, Any], text_len: int) -> SequenceLayout:
    if call.get("enforce_no_swin"):
        return image_layout(model.config, text_len)
    return (keyframe_layout if call["mode_stage1"] else interpolation_layout)(model.config, text_len)


def regenerate(
    model: CogVideoTransformer, call: dict[str, Any], seq: Tensor, guider_seq: Tensor | None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Greedy tokens [B, F, S] and the logits of every step."""
    texts, frames = split_case(seq, call["text_len"], call["frame_len"])
    if guider_seq is not None:
        texts += split_case(guider_seq, call["guider_text_len"], call["frame_len"])[0]
    num_given = int((frames[0] >= 0).all(1).sum())
    seen: dict[int, Tensor] = {}

    def greedy(logits: Tensor, number: int) -> Tensor:
        seen[number] = logits
        return logits.argmax(1)

    out = generate_tokens(
        model,
        layout_of(model, call, max(map(len, texts))),
        texts,
        frames[:, :num_given],
        greedy,
        guidance_alpha=call["guidance_alpha"] if guider_seq is not None else None,
        text_weight=call["log_text_attention_weights"],
        release=True,
    )
    return out, seen


def first_number(seq: Tensor, text_len: int) -> int:
    """Index in the recorded row of the first generated token."""
    return text_len + 1 + int((seq[0, text_len + 1 :] >= 0).sum())


def test_cases_are_there():
    assert case_names()


@pytest.mark.parametrize("name", case_names())
def test_greedy_generation(name: str):
    call, recorded = facts()[name]["call"], tensors()
    model = model_of(2 if facts()[name]["weights"] == "stage2" else 1)
    seq = recorded[f"{name}.seq"]
    out, seen = regenerate(model, call, seq, recorded.get(f"{name}.guider_seq"))
    expected = split_case(recorded[f"{name}.out"], call["text_len"], call["frame_len"])[1]
    assert torch.equal(out, expected)
    offset = first_number(seq, call["text_len"])
    rows = facts()[name]["logits_rows"]
    for step, logits in zip(
        recorded[f"{name}.logit_steps"].tolist(), recorded[f"{name}.logits"], strict=True
    ):
        expected = logits[:, : model.config.num_image_tokens].double()
        torch.testing.assert_close(seen[step - offset][rows], expected, atol=1e-4, rtol=0)


def prefill_logits(model: CogVideoTransformer, name: str, *, release: bool) -> Tensor:
    call, recorded = facts()[name]["call"], tensors()
    tokens = recorded[f"{name}.prefill_input"].long()
    layout = layout_of(model, call, call["text_len"])
    layout = layout.prefix((tokens.shape[1] - call["text_len"]) // call["frame_len"])
    x = model.embed(tokens, layout, None)
    context = FullAttention(
        layout,
        window=model.config.window,
        like=x,
        text_weight=call["log_text_attention_weights"],
        text_weight_temporal=0.0 if release else None,
        cyclic=release,
    )
    for block in model.blocks:
        x = block(x, context)
    return model.logits(model.final_norm(x[:, recorded[f"{name}.prefill_logit_positions"].long()]))


PREFILLS = [name.removesuffix(".prefill_logits") for name in tensors() if name.endswith(".prefill_logits")]


@pytest.mark.parametrize("name", PREFILLS)
@torch.inference_mode()
def test_prefill(name: str):
    model = model_of(2 if facts()[name]["weights"] == "stage2" else 1)
    expected = tensors()[f"{name}.prefill_logits"].double()
    actual = prefill_logits(model, name, release=True)[: len(expected)]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_quirk_cyclic_prefill_windows():
    """The sane form of a windowed prefill differs visibly from the released one."""
    names = [name for name in PREFILLS if facts()[name]["weights"] == "stage2"]
    assert names
    for name in names:
        expected = tensors()[f"{name}.prefill_logits"].double()
        actual = prefill_logits(model_of(2), name, release=False)[: len(expected)]
        assert (actual - expected).abs().max() > 0.1


def test_templates_give_the_recorded_texts():
    """Every recorded text ends in one of the templates, filled with its own prompt and duration."""
    tokenizer, prompts = TableTokenizer(), PromptTemplates()
    for name in case_names():
        text, call = facts()[name]["text"], facts()[name]["call"]
        if call.get("enforce_no_swin"):
            template, duration = prompts.first_frame, 0.0
        else:
            guided = facts()[name]["text_guider"] is not None
            stage1 = prompts.keyframes_guided if guided else prompts.keyframes
            template = stage1 if call["mode_stage1"] else prompts.interpolation
            duration = float(text.split("秒")[0])
        prefix, suffix = template.format(prompt="\0", duration=duration).split("\0")
        prompt = text.removeprefix(prefix).removesuffix(suffix)
        ids = prompt_tokens(template, tokenizer, prompt=prompt, duration=duration)
        assert ids == tensors()[f"{name}.seq"][0, : call["text_len"]].tolist()
        if facts()[name]["text_guider"] is not None:
            ids = prompt_tokens(prompts.keyframes_guider, tokenizer, duration=duration)
            assert ids == tensors()[f"{name}.guider_seq"][0, : call["guider_text_len"]].tolist()


def test_whole_run_is_one_chain():
    """The recorded end-to-end run: the last round's frames, merged, are the recorded video."""
    *_, name = sorted(name for name in case_names() if name.startswith("e2e_"))
    call = facts()[name]["call"]
    frames = split_case(tensors()[f"{name}.out"], call["text_len"], call["frame_len"])[1]
    layout = interpolation_layout(model_of(2).config, call["text_len"])
    expected = tensors()["e2e_final_tokens"].long()
    num_samples = len(expected) - len(frames) * (layout.num_frames - 1)  # one more frame than gaps each
    video = merge_blocks(layout.to_display(frames).unflatten(0, (num_samples, -1)))
    assert torch.equal(video.flatten(0, 1), expected)


def fullvocab_cases() -> list[str]:
    cases = read_json(folder() / "fullvocab.json")
    return [name for name, case in cases.items() if "call" in case]


@pytest.mark.parametrize("name", fullvocab_cases())
def test_full_image_vocabulary(name: str):
    cases = read_json(folder() / "fullvocab.json")
    recorded = read_tensors(folder() / "fullvocab_cases.safetensors")
    call, seq = cases[name]["call"], recorded[f"{name}.seq"]
    start = int(seq[0, call["text_len"]])
    config = config_of(cases["config"], window=0, start_of_image=start, frame_len=call["frame_len"])
    model = build(config, fullvocab_weights(), torch.float64)
    out, seen = regenerate(model, call, seq, recorded.get(f"{name}.guider_seq"))
    assert torch.equal(out, split_case(recorded[f"{name}.out"], call["text_len"], call["frame_len"])[1])
    offset = first_number(seq, call["text_len"])
    for i, step in enumerate(recorded[f"{name}.logit_steps"].tolist()):
        logits = seen[step - offset][0]
        assert logits.shape == (cases[name]["logits_columns"],)
        first = recorded[f"{name}.logits_first256"][i].double()
        torch.testing.assert_close(logits[: len(first)], first, atol=1e-4, rtol=0)
        index = recorded[f"{name}.logits_top8_index"][i].long()
        torch.testing.assert_close(
            logits[index], recorded[f"{name}.logits_top8_value"][i].double(), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(logits.logsumexp(0), recorded[f"{name}.logits_lse"][i], atol=1e-5, rtol=0)
