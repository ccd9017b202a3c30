"""What denoising leaves out: nothing by default, what was asked for otherwise, and it says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogvideox_diff import CogVideoXPipeline, fast_block
from cogvideox_diff.__main__ import main
from cogvideox_diff.approximate import (
    EXACT,
    ApproximateTransformer,
    Approximation,
    AttentionBroadcast,
    FeatureCache,
    attention_outputs,
    modulated_input,
    relative_change,
    run_with,
)
from cogvideox_diff.memory import stage_needs
from cogvideox_diff.parallel import ParallelTransformer
from cogvideox_diff.planning import CallSettings, check_request, plan_inversion
from cogvideox_diff.transformer import ExpertTransformer
from shared.distributed import ParallelContext
from shared.errors import SettingError
from shared.protocol import GenerationRequest
from tests.cogvideox_diff.tiny_pipeline import PROMPT, clip, make, tiny_config, write_tokenizer

STEPS = 6
TINY = 1e-30  # a change that every step exceeds
HUGE = 1e30  # one that none does


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pipe(spiece: Path) -> CogVideoXPipeline:
    return make("5b", spiece)


def latents(pipe: CogVideoXPipeline, prompt: str | list[str] = PROMPT, **settings: Any) -> Tensor:
    made = pipe(prompt, output_type="latent", num_inference_steps=STEPS, **settings)
    return torch.stack(made) if isinstance(made, list) else made


def calls_of(part: nn.Module, run: Callable[[], object]) -> int:
    counted: list[int] = []
    handle = part.register_forward_hook(lambda *_: counted.append(1))
    run()
    handle.remove()
    return len(counted)


# ---- feature cache


def test_nothing_is_left_out_by_default(pipe: CogVideoXPipeline) -> None:
    result = pipe.generate(GenerationRequest(prompt=PROMPT))
    assert not EXACT.is_on and not result.measured and "approximate" not in result.settings


def test_a_small_threshold_is_exact(pipe: CogVideoXPipeline) -> None:
    assert torch.equal(latents(pipe), latents(pipe, approximation=Approximation(feature_cache=TINY)))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_large_threshold_leaves_the_first_and_the_last_step(
    pipe: CogVideoXPipeline, guidance_scale: float
) -> None:
    settings = {"approximation": Approximation(feature_cache=HUGE), "guidance_scale": guidance_scale}
    block = pipe.parts.transformer.blocks[0]
    assert calls_of(block, lambda: latents(pipe, **settings)) == 2
    assert not torch.equal(latents(pipe, **settings), latents(pipe, guidance_scale=guidance_scale))
    assert torch.equal(latents(pipe, **settings), latents(pipe, **settings)), "nothing is left of a call"


def test_videos_of_a_batch_decide_for_themselves(pipe: CogVideoXPipeline) -> None:
    """Each is what it is alone, though they skip at different steps."""
    threshold = median_drift(pipe)
    approximation = Approximation(feature_cache=threshold)
    requests = [GenerationRequest(prompt=PROMPT, seed=seed) for seed in range(4)]
    settings = CallSettings(num_inference_steps=STEPS, approximation=approximation)
    together = pipe.generate_batch(requests, settings)
    alone = [pipe.generate(request, settings) for request in requests]
    assert [x.measured for x in together] == [x.measured for x in alone]
    for one, many in zip(alone, together, strict=True):
        assert int((one.video.frames.int() - many.video.frames.int()).abs().max()) <= 1
    skipped = [x.measured["approximation"]["steps_skipped"] for x in together]
    assert 0 < sum(skipped) < 4 * (STEPS - 2)
    assert together[0].settings["approximate"] == {"feature_cache": threshold}


def median_drift(pipe: CogVideoXPipeline) -> float:
    """A change that some steps exceed."""
    changes: list[float] = []
    inputs: list[Tensor] = []

    def watch(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        _, video, emb, *_ = given
        inputs.append(modulated_input(pipe.parts.transformer.blocks[0], video, emb))  # type: ignore[arg-type]
        if len(inputs) > 1:
            changes.extend(relative_change(*inputs[-2:]).tolist())

    handle = pipe.parts.transformer.blocks[0].register_forward_pre_hook(watch)
    latents(pipe)
    handle.remove()
    return 1.5 * sorted(changes)[len(changes) // 2]


def test_the_modulated_input_is_what_attention_reads(pipe: CogVideoXPipeline) -> None:
    block, (text, video, emb) = pipe.parts.transformer.blocks[0], tokens(pipe.parts.transformer)
    joint, _, _ = block.norm1(text, video, emb)  # type: ignore[operator]
    torch.testing.assert_close(modulated_input(block, video, emb), joint[:, text.shape[1] :])  # type: ignore[arg-type]
    x = torch.tensor([[[1.0, -1.0]], [[2.0, 2.0]]])
    assert relative_change(x, x * torch.tensor([1.5, 1.0])[:, None, None]).tolist() == [0.5, 0.0]


def test_skipped_rows_get_what_was_added_before() -> None:
    """With a stand-in for the transformer whose blocks add a constant that grows with every run."""
    cache = FeatureCache(0.25, num_steps=9)
    model = Adding(tiny_config("5b").transformer)
    video = torch.ones(2, 3, model.config.hidden_dim)
    emb = torch.zeros(2, model.config.time_embed_dim)
    text = torch.zeros(2, 1, model.config.hidden_dim)
    added = []
    for scale in ([1, 1], [1.2, 1], [1.4, 1], [1.4, 1]):  # changes of row 0: 20 %, then 17 %
        x = video * torch.tensor(scale)[:, None, None]
        added.append((cache.run(model, text, x, emb, None, 500.0) - x).mean(dim=(1, 2)).round().tolist())
    assert added == [[1, 1], [1, 1], [2, 1], [2, 1]]
    assert cache.report(1) == [{"steps": 4, "steps_skipped": 3}]
    assert cache.report(2)[0] == {"steps": 4, "steps_skipped": 2}


class Adding(ExpertTransformer):
    """The first block's input is the video itself."""

    runs = 0

    def __init__(self, config: object) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        self.blocks[0].norm1.norm = nn.Identity()  # type: ignore[union-attr]
        for x in self.blocks[0].norm1.video.parameters():  # type: ignore[union-attr]
            nn.init.zeros_(x)

    def run_blocks(self, text_BLD: Tensor, video_BVD: Tensor, *_: object) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        self.runs += 1
        return text_BLD, video_BVD + self.runs


# ---- attention broadcast


def tokens(model: ExpertTransformer) -> tuple[Tensor, Tensor, Tensor]:
    config, random = model.config, torch.Generator().manual_seed(0)
    sizes = ((2, config.text_len, config.hidden_dim), (2, 18, config.hidden_dim), (2, config.time_embed_dim))
    text, video, emb = (torch.randn(size, generator=random) for size in sizes)
    return text, video, emb


@pytest.mark.parametrize("quick", [False, True])
@torch.no_grad()
def test_a_block_with_its_own_attention_is_the_block(
    pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    monkeypatch.setattr(fast_block, "FEWEST_VALUES", 1 if quick else 2**60)
    model = pipe.parts.transformer
    text, video, emb = tokens(model)
    with attention_outputs(model.blocks) as outputs:
        wanted = model.blocks[1](text, video, emb, None)
    assert not outputs[0] and len(outputs[1]) == (2 if quick else 1)
    attended = torch.stack(outputs[1]) if quick else outputs[1][0]
    got = run_with(model.blocks[1], attended, text, video, emb)  # type: ignore[arg-type]
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert not model.blocks[1].attn.out._forward_hooks  # type: ignore[union-attr]


def test_attention_runs_in_one_of_so_many_middle_steps() -> None:
    model = ExpertTransformer(tiny_config("5b").transformer)
    text, video, emb = tokens(model)
    broadcast = AttentionBroadcast(3)
    ran = []
    with torch.no_grad():
        for timestep in (999, 900, 800, 700, 600, 500, 400, 90, 80):
            run = lambda t=timestep: broadcast.run(model, text, video, emb, None, float(t))  # noqa: E731
            ran.append(calls_of(model.blocks[0].attn.out, run))  # type: ignore[union-attr,arg-type]
    assert ran == [1, 1, 0, 0, 1, 0, 0, 1, 1]
    assert broadcast.report(2) == [{"steps": 9, "steps_with_old_attention": 4}] * 2


def test_broadcast_changes_the_video_and_batches_do_not(pipe: CogVideoXPipeline) -> None:
    on = {"approximation": Approximation(attention_every=2)}
    texts = [PROMPT, "a blue square stays"]
    batch = latents(pipe, texts, **on)
    for text, x in zip(texts, batch, strict=True):
        torch.testing.assert_close(x, latents(pipe, text, **on), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(x, latents(pipe, text), atol=1e-2)


# ---- what it does not go with


def test_illegal_settings_are_refused() -> None:
    cases: list[tuple[dict[str, float], str]] = [
        ({"feature_cache": -0.1}, r"feature_cache must be a number from 0 \(off\) on, got -0.1; nearest: 0"),
        ({"feature_cache": float("nan")}, "got nan"),
        ({"attention_every": 0}, r"attention_every must be at least 1 \(off\), got 0; nearest: 1"),
        ({"attention_every": 2, "feature_cache": 0.1}, "legal: one of them"),
    ]
    for settings, reason in cases:
        with pytest.raises(SettingError, match=reason):
            Approximation(**settings)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="one process for the transformer"):
        Approximation(feature_cache=0.1).check(processes=2)
    with pytest.raises(SettingError, match="legal: none, model"):
        Approximation(attention_every=2).check(offload="sequential")
    Approximation(feature_cache=0.1).check(offload="sequential")
    EXACT.check(offload="sequential", processes=8)


def test_a_shared_transformer_is_refused() -> None:
    config, two = tiny_config("5b").transformer, ParallelContext(ranks=(0, 1))
    shared = ParallelTransformer(config, guidance=two, sequence=ParallelContext())
    with pytest.raises(SettingError, match="one process"):
        ApproximateTransformer(shared, Approximation(feature_cache=0.1), STEPS)


def test_inversion_is_exact(pipe: CogVideoXPipeline) -> None:
    with pytest.raises(SettingError, match="exact model"):
        plan_inversion(pipe.config, CallSettings(approximation=Approximation(feature_cache=0.1)), clip())


# ---- memory


@pytest.mark.parametrize(
    "approximation", [Approximation(feature_cache=0.1), Approximation(attention_every=2)]
)
def test_what_is_kept_is_planned(pipe: CogVideoXPipeline, approximation: Approximation) -> None:
    model, (text, video, emb) = pipe.parts.transformer, tokens(pipe.parts.transformer)
    blocks = ApproximateTransformer(model, approximation, STEPS).blocks
    with torch.no_grad():
        blocks.run(model, text, video, emb, None, 500.0)
    held = vars(blocks)
    kept = [
        *held.get("_attended", []),
        *(x for x in (held.get("_input"), held.get("_added")) if x is not None),
    ]
    planned = approximation.kept_bytes(model.config, video.shape[1], rows=2, size=4)
    assert planned == sum(x.nbytes for x in kept)
    plain, more = (
        stage_needs(pipe.config, check_request(pipe.config, CallSettings(approximation=a)), torch.float32)[1]
        for a in (EXACT, approximation)
    )
    assert more.stage == "model" and more.work > plain.work


# ---- the command line


def test_the_sidecar_says_what_was_left_out(pipe: CogVideoXPipeline, tmp_path: Path) -> None:
    model = pipe.save_pretrained(tmp_path / "model")
    words = ["generate", "--prompt", PROMPT, "--model_path", str(model), "--device", "cpu", "--quiet"]
    words += ["--num_inference_steps", "4", "--output_path"]
    assert main([*words, str(tmp_path / "exact.mp4")]) == 0
    assert main([*words, str(tmp_path / "a.mp4"), "--approximate_feature_cache", "1e9"]) == 0
    assert main([*words, str(tmp_path / "b.mp4"), "--approximate_attention_every", "2"]) == 0
    exact, a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("exact", "a", "b"))
    assert "approximate" not in exact["settings"] and "measured" not in exact
    assert a["settings"]["approximate"] == {"feature_cache": 1e9}
    assert a["measured"] == {"approximation": {"steps": 4, "steps_skipped": 2}}
    assert b["settings"]["approximate"] == {"attention_every": 2}
    assert len({x["settings_hash"] for x in (exact, a, b)}) == 3


def test_the_command_refuses_and_warns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ("--approximate_feature_cache", "0.5", "--approximate_attention_every", "2")
    out = str(tmp_path / "a.mp4")
    assert main(["generate", "--prompt", PROMPT, "--device", "cpu", "--output_path", out, *flags]) == 2
    assert "legal: one of them" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert capsys.readouterr().out.count("NOT exact") == 3
