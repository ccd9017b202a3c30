"""The pipeline around the network, call by call: a stub stands in for it, as in the recording."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo_ar import interpolation, keyframes
from cogvideo_ar.config import SamplingConfig
from cogvideo_ar.generation import GreedySampler, StageSamplers
from cogvideo_ar.layout import SequenceLayout
from cogvideo_ar.transformer import CogVideoTransformer
from tests.parity.cogvideo_ar.stages import TableTokenizer, config_of, folder, special_ids
from tests.parity.recorded import read_json

pytestmark = pytest.mark.parity


def recursion() -> dict[str, Any]:
    return read_json(folder() / "recursion.json")


def run_names() -> list[str]:
    return [name for name, run in recursion().items() if "calls" in run]


class StubNetwork:
    """Stands in for the decoders: stage 1 answers as recorded, an interpolated frame is its
    neighbours' mean."""

    def __init__(self, calls: list[dict[str, Any]], start_of_image: int) -> None:
        self.expected, self.start_of_image = list(calls), start_of_image

    def __call__(
        self,
        model: CogVideoTransformer,
        layout: SequenceLayout,
        texts: list[list[int]],
        given_BGS: Tensor,
        sample: object,
        *,
        guidance_alpha: float | None = None,
        text_weight: float = 0.0,
        release: bool = False,
        count: object = None,
    ) -> Tensor:
        call = self.expected.pop(0)
        self.check(call, layout, texts, given_BGS, guidance_alpha, text_weight)
        if call["stage"] == "stage2":
            between = (given_BGS[:, :-1] + given_BGS[:, 1:]) // 2
            out = torch.cat([given_BGS, between], dim=1)
            assert out[:, :, 0].tolist() == call["returned_frame_values"]
            return out
        return torch.tensor(call["returned_frame_values"])[:, :, None].expand(-1, -1, layout.frame_len)

    def check(
        self,
        call: dict[str, Any],
        layout: SequenceLayout,
        texts: list[list[int]],
        given_BGS: Tensor,
        alpha: float | None,
        text_weight: float,
    ) -> None:
        num_samples = len(given_BGS)
        known = [[value for value in row if value >= 0] for row in call["given_frame_values"]]
        if call["stage"] == "first_frame":  # upstream expands its one row after the prefill
            known = known * num_samples
            assert layout.base_only == call["args"]["enforce_no_swin"]
        assert num_samples == call["batch"]
        assert [row.tolist() for row in given_BGS[:, :, 0]] == known
        assert text_weight == call["args"]["log_text_attention_weights"]
        for text in texts[:num_samples]:
            assert [*text, self.start_of_image] == call["prefix_ids"]
        assert (alpha is not None) == (call["guider_prefix_ids"] is not None)
        for text in texts[num_samples:]:
            assert [*text, self.start_of_image] == call["guider_prefix_ids"]
        if alpha is not None:
            assert alpha == call["args"]["guidance_alpha"]


@pytest.mark.parametrize("name", run_names())
def test_recorded_run(name: str, monkeypatch: pytest.MonkeyPatch):
    run, rounds = recursion()[name], recursion()["frames_per_round"]
    facts = read_json(folder() / "train_cases.json")["config"]
    start = special_ids()["<start_of_image>"]
    frame_len = facts["layout"][1] - facts["layout"][0]
    config = config_of(facts, window=0, start_of_image=start, frame_len=frame_len)
    stub = StubNetwork(run["calls"], start)
    monkeypatch.setattr(keyframes, "generate_tokens", stub)
    monkeypatch.setattr(keyframes, "generate_tokens_with_guesses", stub)
    monkeypatch.setattr(interpolation, "generate_tokens_in_waves", stub)

    guided = any(call["guider_prefix_ids"] is not None for call in run["calls"])
    alphas = [call["args"]["guidance_alpha"] for call in run["calls"] if call["stage"] == "stage1"]
    sampling = SamplingConfig(
        guidance_alpha=alphas[0] if guided else 1.0,
        interpolation_durations=tuple(rounds["durations"]),
        max_batch=max(call["batch"] for call in run["calls"]),
        compat="release",
    )
    num_samples = run["calls"][0]["batch"]
    with torch.device("meta"):
        model = CogVideoTransformer(config)
    model.word_embeddings.to_empty(device="cpu")
    arguments = (
        TableTokenizer(),
        [run["prompt"]] * num_samples,
        sampling,
        StageSamplers(first_frame=GreedySampler(), default=GreedySampler()),
        [torch.Generator() for _ in range(num_samples)],
    )
    first = keyframes.generate_first_frames(model, *arguments)
    frames = keyframes.generate_keyframes(model, *arguments, first)
    assert frames.shape[1] == rounds["start"]
    video = interpolation.interpolate(model, *arguments, frames)
    assert not stub.expected
    assert video.shape[1] == rounds["frames"][-1]
    assert video[:, :, 0].tolist() == run["super_resolution_input"]["frame_values"]
    assert bool((video == video[:, :, :1]).all())
    prompt = sampling.prompts.super_resolution.format(prompt=run["prompt"])
    assert TableTokenizer().encode(prompt) == run["super_resolution_input"]["text_ids"]


def test_runs_are_there():
    assert run_names()


def test_frames_per_round():
    rounds = recursion()["frames_per_round"]
    frames = [rounds["start"]]
    for _ in rounds["durations"]:
        frames.append(2 * frames[-1] - 1)
    assert frames[1:] == rounds["frames"]
    assert rounds["durations"] == list(SamplingConfig().interpolation_durations)
