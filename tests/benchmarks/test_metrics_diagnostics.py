"""What the shipped models say of true clips, and how a run keeps it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.evaluation import evaluate
from benchmarks.metrics import METRICS, diagnostics
from benchmarks.runner import run_suite
from benchmarks.storage import RunFolder
from benchmarks.suites import Suite
from cogvideo_ar.diagnostics import codebook_use, diagnose, keyframe_codes
from cogvideo_ar.training.objective import token_losses
from cogvideox_diff.diagnostics import clip_latents
from shared.clips import shapes
from shared.video import Video
from tests.benchmarks.fakes import FakeGenerator
from tests.cogvideo_ar.tiny_pipeline import tiny_parts, tiny_sampling
from tests.cogvideox_diff import tiny_pipeline as tiny_x

PROMPT = "a red circle moving left"


def noise_clip(frames: int, height: int, width: int, fps: float = 8.0) -> Video:
    random = torch.Generator().manual_seed(1)
    return Video(frames=torch.randint(256, (frames, height, width, 3), generator=random).byte(), fps=fps)


# ---- CogVideo


def test_bits_are_those_of_the_training_loss(tmp_path: Path) -> None:
    """Written once more, frame by frame: the tokens of frames 0..k predict those of frame k."""
    from cogvideo_ar.layout import image_layout, keyframe_layout, pad_text, prompt_tokens, training_batch

    parts, sampling = tiny_parts(tmp_path), tiny_sampling()
    clip = noise_clip(round(sampling.keyframe_duration * 8) + 1, 16, 32)
    found = diagnose(parts, sampling, [clip], [PROMPT])
    config, codes = parts.config.keyframes, keyframe_codes(parts, sampling, clip)
    total = 0.0
    for template, make, frames in (
        (sampling.prompts.first_frame, image_layout, slice(0, 1)),
        (sampling.prompts.keyframes, keyframe_layout, slice(0, config.num_frames)),
    ):
        text = prompt_tokens(template, parts.tokenizer, prompt=PROMPT, duration=sampling.keyframe_duration)
        layout = make(config, len(text))
        ids = pad_text([text], config.pad_token)[0]
        batch = training_batch(layout, ids, codes[None, frames], start_of_image=config.start_of_image)
        losses = token_losses(parts.keyframes(batch.tokens, layout), batch.labels)[0]
        total += float(losses[layout.num_given :].double().sum().detach())
    bits = total / codes.numel() / math.log(2)
    assert found["bits_per_token"][0] == pytest.approx(bits, rel=1e-5)
    assert found["perplexity"][0] == pytest.approx(2**bits, rel=1e-5)


def test_codebook_use_by_hand(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path)  # 32 codes
    values = codebook_use(parts, torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]))
    assert values["codebook_share"] == 4 / 32 and values["code_perplexity"] == pytest.approx(4.0)
    assert codebook_use(parts, torch.zeros(2, 4, dtype=torch.long))["code_perplexity"] == pytest.approx(1.0)


def test_a_clip_shorter_than_the_key_frames_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the clip has 5 frames at 8 fps"):
        diagnose(tiny_parts(tmp_path), tiny_sampling(), [noise_clip(5, 16, 32)], [PROMPT])


# ---- CogVideoX


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_x.write_tokenizer(tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("variant", ["2b", "1.5"])
def test_losses_of_a_model_that_knows_the_answer(
    variant: str, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """v = (a x_t - x0) / s in exact arithmetic, so a model that knows x0 has no loss; one that says 0 has the
    mean square of v."""
    from cogvideox_diff.schedule import NoiseSchedule

    pipeline = tiny_x.make(variant, tokenizer)
    clip = tiny_x.clip()
    x0 = clip_latents(pipeline.engine, clip)
    schedule = NoiseSchedule.from_config(pipeline.config.schedule)

    def oracle(x: torch.Tensor, text: torch.Tensor, steps: torch.Tensor, ofs: object = None) -> torch.Tensor:
        a, s = schedule.coefficients(steps, x.double())
        return ((a * x.double() - x0.double()) / s).float()

    monkeypatch.setattr(pipeline.engine.parts.transformer, "forward", oracle)
    values = pipeline.diagnostics([clip], [tiny_x.PROMPT])
    assert values.keys() == {f"loss_{a:03d}_{b:03d}" for a, b in diagnostics.BINS}
    assert max(x[0] for x in values.values()) < 1e-3
    monkeypatch.setattr(pipeline.engine.parts.transformer, "forward", lambda x, *rest: torch.zeros_like(x))
    high = pipeline.diagnostics([clip, clip], [tiny_x.PROMPT] * 2)
    assert high["loss_000_199"][0] == high["loss_000_199"][1] > 0.3  # near t = 0 v is the noise


def test_an_image_model_has_no_loss_without_an_image(tokenizer: Path) -> None:
    with pytest.raises(ValueError, match="without an image"):
        tiny_x.make("5b-i2v", tokenizer).diagnostics([tiny_x.clip()], [tiny_x.PROMPT])


# ---- in a run


class Telling(FakeGenerator):
    """Says how bright a clip is."""

    def diagnostics(self, videos: Sequence[Video], prompts: Sequence[str]) -> dict[str, list[float]]:
        if self.steps == 13:
            raise ValueError("these clips are too short")
        assert len(videos) == len(prompts) == 1 and shapes.parse(prompts[0])
        return {"perplexity": [float(video.frames.float().mean()) for video in videos]}


SUITE = Suite(name="told", models=("telling",), num_prompts=2, num_clips=2)


def test_a_run_keeps_what_the_model_says(tmp_path: Path) -> None:
    folder, model = RunFolder(path=tmp_path / "run"), Telling("telling")
    outcome = run_suite(SUITE, folder, build=lambda name: model, quiet=True)
    assert outcome.made == 2 + 2 + 2 and not outcome.failed
    again = run_suite(SUITE, folder, build=lambda name: model, quiet=True)
    assert "nothing to do: all 6 items" in again.summary
    results = evaluate(folder)
    value = results["models"]["telling"]["metrics"]["diagnostics/perplexity"]
    assert value["n"] == 2 and 0 < value["low"] <= value["value"] <= value["high"] < 255
    model.steps = 8
    assert run_suite(SUITE, folder, build=lambda name: model, quiet=True).made == 6


def test_clips_that_do_not_fit_are_refused_and_fail_nothing(tmp_path: Path) -> None:
    folder, model = RunFolder(path=tmp_path / "run"), Telling("telling", steps=13)
    assert not run_suite(SUITE, folder, build=lambda name: model, quiet=True).failed
    row = evaluate(folder)["models"]["telling"]
    assert row["refused"]["diagnostics"] == "these clips are too short"
    assert "diagnostics/perplexity" not in row["metrics"]


@pytest.mark.parametrize("family", ["cogvideo", "cogvideox"])
def test_the_shipped_models_know_what_their_captions_mean(family: str) -> None:
    """The wrong caption makes a true clip less likely."""
    from benchmarks import registry

    caption = shapes.prompts("heldout", 1, seed=3)[0]
    clip = shapes.render(shapes.draw_scene(np.random.default_rng(0), caption=caption))
    other = next(
        c for c in shapes.captions() if c.colour != caption.colour and c.background != caption.background
    )
    values = registry.build(f"{family}-demo").diagnostics([clip, clip], [caption.text, other.text])
    assert {f"diagnostics/{name}" for name in values} <= METRICS.keys()
    name = "bits_per_token" if family == "cogvideo" else "loss_600_799"
    assert values[name][0] < 0.7 * values[name][1]
