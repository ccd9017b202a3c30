"""The cost model of CogVideo: operations against torch's counter, memory against what real runs hold."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from cogvideo_ar import fast_decode
from cogvideo_ar.__main__ import main
from cogvideo_ar.config import (
    SuperResolutionConfig,
    TransformerConfig,
    VQVAEConfig,
    cogvideo,
    cogvideo_demo,
    cogview2_dsr,
    cogview2_itersr,
)
from cogvideo_ar.costs import (
    TokenStage,
    cache_bytes,
    codec_params,
    codec_parts,
    codec_work,
    fine_params,
    fine_parts,
    fine_work,
    first_frame_stage,
    interpolation_stages,
    keyframe_stage,
    prefill_work,
    stage_costs,
    transformer_params,
)
from cogvideo_ar.generation import generate_tokens, prefill
from cogvideo_ar.options import Options, resolve
from cogvideo_ar.sampling import CogLMSampler
from cogvideo_ar.super_resolution.direct import enlarge_frames
from cogvideo_ar.super_resolution.iterative import build_pass_samplers, refine_frames
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideo_ar.vqvae import VQVAE
from cogvideo_ar.wavefront import generate_tokens_in_waves
from shared.costs import DEVICES, total_flops
from shared.memory import peak_bytes
from tests.shared.counting import counted_flops

TEXT = 10
BASE = TransformerConfig(
    num_layers=2,
    num_heads=4,
    head_dim=32,
    vocab_size=300,
    num_image_tokens=256,
    start_of_image=290,
    pad_token=291,
    max_text_len=16,
    num_positions=128,
    num_extra_positions=400,
    image_position_offset=32,
    grid=(6, 6),
)
CHANNELS = {
    "full": BASE,
    "window": replace(BASE, temporal="window", window=3),
    "local": replace(BASE, temporal="local", extent=(2, 3, 3)),
}
DEMO = cogvideo_demo()


@pytest.fixture(autouse=True)
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is of the plain blocks: the CPU's copies of the weights of small nets come on top."""
    monkeypatch.setattr(fast_decode, "MOST_BYTES", 0)


def stages_of(config: TransformerConfig, text: int = TEXT) -> dict[str, TokenStage]:
    between = interpolation_stages(config, text, 2, max_batch=8, guided=False)
    return {
        "first frame": first_frame_stage(config, text, 2),
        "key frames": keyframe_stage(config, text, 2, num_frames=3, guided=False),
        "guided key frames": keyframe_stage(config, text, 1, num_frames=3, guided=True),
        "interpolation": between[0],
    }


class Run:
    """One real run of a stage; `prefill` is its beginning."""

    def __init__(self, stage: TokenStage, *, guided: bool, dtype: torch.dtype = torch.float32) -> None:
        self.stage, self.groups = stage, 1 + guided
        self.net = CogVideoTransformer(stage.config).eval().to(dtype)
        samples = stage.rows // self.groups
        layout, images = stage.layout, stage.config.num_image_tokens
        self.given = torch.randint(images, (samples, layout.num_given, layout.frame_len))
        self.texts = [[stage.config.pad_token + 1] * layout.text_len] * stage.rows
        self.uniforms = torch.rand(samples, layout.frame_len * layout.num_frames, 2, dtype=torch.float64)
        self.sampler = CogLMSampler(torch.arange(images) % 16)

    def __call__(self) -> None:
        generate = generate_tokens_in_waves if self.stage.waves else generate_tokens
        generate(
            self.net,
            self.stage.layout,
            self.texts,
            self.given,
            lambda logits, number: self.sampler.sample(logits, self.uniforms[:, number]),
            guidance_alpha=2.0 if self.groups == 2 else None,
            text_weight=0.5,
        )

    def prefill(self) -> None:
        prefill(
            self.net,
            self.stage.layout,
            self.texts,
            self.given,
            groups=self.groups,
            text_weight=0.5,
            release=False,
        )


# ---- operations


@pytest.mark.parametrize("name", ["first frame", "key frames", "guided key frames", "interpolation"])
@pytest.mark.parametrize("channel", CHANNELS)
def test_a_stage_has_the_counters_operations(channel: str, name: str):
    stage = stages_of(CHANNELS[channel])[name]
    predicted = total_flops(stage.cost(4)[3])  # the schedule's own products come first
    run = Run(stage, guided=name.startswith("guided"))
    assert predicted == pytest.approx(counted_flops(run), rel=0.01)


def test_rounds_that_exceed_a_batch_are_counted_by_batches():
    stages = interpolation_stages(CHANNELS["window"], TEXT, 7, max_batch=3, guided=True)
    assert [(stage.rows, stage.runs) for stage in stages] == [(6, 2), (2, 1)]
    whole = interpolation_stages(CHANNELS["window"], TEXT, 7, max_batch=7, guided=True)
    flops = [sum(total_flops(stage.cost(4)[3]) for stage in some) for some in (stages, whole)]
    assert flops[0] == flops[1]


def fine_config(kind: Any) -> SuperResolutionConfig:
    return SuperResolutionConfig(
        kind=kind,
        num_layers=2,
        num_heads=2,
        head_dim=32,
        text_len=12,
        vocab_size=300,
        num_image_tokens=256,
        start_of_image=290,
        num_positions=128,
        coarse_position_offset=20,
        coarse_grid=(6, 6),
        fine_grid=(18, 18),
    )


def fine_run(config: SuperResolutionConfig, frames: int, dtype: torch.dtype) -> Any:
    net = SuperResolutionTransformer(config).eval().to(dtype)
    texts = [[295] * 8] * frames
    if config.kind == "direct":
        uniforms = torch.rand(frames, config.fine_len, 2, dtype=torch.float64)
        coarse = torch.randint(256, (frames, config.coarse_len))
        sampler = CogLMSampler(torch.arange(256) % 16)
        return lambda: enlarge_frames(net, texts, coarse, sampler, uniforms)
    uniforms = torch.rand(frames, len(config.pass_top_k), config.fine_len, 2, dtype=torch.float64)
    fine = torch.randint(256, (frames, config.fine_len))
    return lambda: refine_frames(net, texts, fine, build_pass_samplers(config), uniforms)


@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_super_resolution_has_the_counters_operations(kind: str):
    config = replace(fine_config(kind), max_batch=2)
    counted = counted_flops(fine_run(config, 3, torch.float32))
    assert total_flops(fine_parts(config, 3, 4)) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("rates", [(8,), (4, 8, 16)])
def test_the_codec_has_the_counters_operations(rates: tuple[int, ...]):
    config = replace(DEMO.vqvae, rates=rates)
    net, codes = VQVAE(config), torch.randint(64, (3, 6, 5))
    counted = counted_flops(lambda: net.decode(codes, 8))
    assert total_flops(codec_parts(config, 3, (6, 5))) == pytest.approx(counted, rel=0.01)


# ---- memory


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("name", ["first frame", "guided key frames", "interpolation"])
def test_the_cache_has_the_predicted_bytes(channel: str, name: str):
    stage = stages_of(CHANNELS[channel])[name]
    run = Run(stage, guided=name.startswith("guided"))
    state = run.net.start(
        torch.tensor(run.texts),
        torch.randint(256, (stage.rows, stage.layout.num_given * stage.layout.frame_len)),
        stage.layout,
    )
    held = sum(cache.spatial.nbytes + cache.temporal.nbytes for cache in state.caches)
    assert cache_bytes(stage.config, stage.layout, stage.rows, 4, 1) == held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["guided key frames", "interpolation"])
@pytest.mark.parametrize("channel", ["full", "window"])
def test_a_prefill_holds_what_is_predicted(channel: str, name: str, dtype: torch.dtype):
    config = replace(
        CHANNELS[channel], grid=(12, 12), num_positions=256, num_extra_positions=1000, head_dim=64
    )
    if config.window:
        config = replace(config, window=6)
    stage = stages_of(config, text=16)[name]
    run, size = Run(stage, guided=name.startswith("guided"), dtype=dtype), dtype.itemsize
    cache = cache_bytes(config, stage.layout, stage.rows, size, 1)
    positions = stage.layout.num_frames * stage.layout.frame_len * config.hidden_size * size
    measured = peak_bytes(run.prefill) - cache - positions
    # in float32 the CPU's product with its GELU holds the inner rows once
    assert prefill_work(config, stage.layout, stage.rows, size) == pytest.approx(measured, rel=0.18)


@pytest.mark.parametrize("name", ["first frame", "guided key frames", "interpolation"])
@pytest.mark.parametrize("channel", ["full", "window"])
def test_decoding_with_its_cache_holds_what_is_predicted(channel: str, name: str):
    stage = stages_of(CHANNELS[channel])[name]
    _, cache, work, _ = stage.cost(4)
    measured = peak_bytes(Run(stage, guided=name.startswith("guided")))
    assert cache + work == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_super_resolution_holds_what_is_predicted(dtype: torch.dtype):
    config = fine_config("direct")
    measured = peak_bytes(fine_run(config, 2, dtype))
    assert fine_work(config, 2, dtype.itemsize) == pytest.approx(measured, rel=0.15)


def test_decoding_codes_holds_what_is_predicted():
    config, codes = DEMO.vqvae, torch.randint(64, (4, 8, 8))
    net = VQVAE(config)
    measured = peak_bytes(lambda: net.decode(codes, 8))
    assert codec_work(config, 4, (8, 8)) == pytest.approx(measured, rel=0.15)


# ---- the released model


@pytest.mark.parametrize("config", [cogvideo().keyframes, cogvideo().interpolation, *CHANNELS.values()])
def test_parameters_are_those_of_the_net(config: TransformerConfig):
    with torch.device("meta"):
        net = CogVideoTransformer(config)
    own = sum(x.numel() for _, x in net.temporal_parameters())
    assert transformer_params(config) == (sum(x.numel() for x in net.parameters()), own)


@pytest.mark.parametrize("config", [cogview2_dsr(), cogview2_itersr()])
def test_parameters_of_super_resolution_are_those_of_the_net(config: SuperResolutionConfig):
    with torch.device("meta"):
        net = SuperResolutionTransformer(config)
    assert fine_params(config) == sum(x.numel() for x in net.parameters())


def test_the_released_codec_has_its_parameters():
    with torch.device("meta"):
        net = VQVAE(VQVAEConfig())
    assert codec_params(VQVAEConfig()) >= sum(x.numel() for x in net.parameters())


def test_decoding_the_9b_model_takes_little_beside_weights_and_cache():
    config = cogvideo()
    costs = stage_costs(config, resolve(config, Options()), torch.float16)
    tokens = [cost for cost in costs if cost.unit == "tokens"]
    assert [cost.name for cost in tokens] == ["model/first_frame", "model/keyframes", "model/interpolation"]
    for cost in tokens:
        assert cost.weights == 2 * 7_721_127_936
        assert cost.weights + cost.cache + cost.work <= 1.1 * (cost.weights + cost.cache)
    both = tokens[1].weights + tokens[2].weights - tokens[2].shared
    assert both == 2 * 9_539_948_544  # 9.5 billion parameters in both stages


def test_the_9b_model_has_the_steps_and_the_floor_that_are_known():
    """1600 tokens of four key frames; 589 steps a round of the shifted windows; 14.6 GB read in a step."""
    config = cogvideo()
    costs = {c.name: c for c in stage_costs(config, resolve(config, Options()), torch.float16)}
    assert costs["model/first_frame"].steps == 400
    assert costs["model/keyframes"].steps == 1600
    assert costs["model/interpolation"].steps == 3 * 589
    one_read = 2 * (48 * 16 * 3072**2 + 20000 * 3072)
    keyframes = costs["model/keyframes"]
    assert 1600 * one_read < keyframes.moved < 1.35 * 1600 * one_read
    seconds = DEVICES["h200"].stage_seconds(keyframes, torch.float16)
    assert 1600 * one_read / 4.8e12 < seconds < 1.8 * 1600 * one_read / 4.8e12


# ---- the verb


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["plan", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_plan_says_the_bytes_of_the_9b_model(capsys: pytest.CaptureFixture[str]):
    code, said = plan(capsys, "--preset", "cogvideo", "--device", "h200")
    assert code == 0
    stages = {stage["stage"]: stage for stage in said["stages"]}
    assert list(stages) == [
        "model/first_frame",
        "model/keyframes",
        "model/interpolation",
        "model/super_resolution",
        "decode",
    ]
    assert said["settings"]["height"] == 480 and said["settings"]["num_frames"] == 33
    assert stages["model/interpolation"]["cache_bytes"] > stages["model/keyframes"]["cache_bytes"] > 2**30


def test_plan_finds_the_saver_that_fits(capsys: pytest.CaptureFixture[str]):
    code, said = plan(capsys, "--preset", "cogvideo", "--device", "a100-40")
    assert code == 0 and not said["ladder"][0]["fits"] and said["ladder"][-1]["fits"]


def test_plan_refuses_what_never_fits(capsys: pytest.CaptureFixture[str]):
    code, said = plan(capsys, "--preset", "cogvideo", "--device", "l4", "--memory", "1.1")
    assert code == 4 and said["error"] == "OutOfMemoryError" and "nothing fits" in said["reason"]


def test_plan_of_the_demo_model_reads_its_configuration(capsys: pytest.CaptureFixture[str]):
    code, said = plan(capsys, "--device", "cpu", "--stages", "1")
    assert code == 0 and said["settings"]["num_frames"] == 5


@pytest.mark.parametrize(
    "words", [["--preset", "cogvido"], ["--text_len", "9999"], ["--num_frames", "6"], ["--batch", "0"]]
)
def test_plan_refuses_illegal_settings(capsys: pytest.CaptureFixture[str], words: list[str]):
    code, said = plan(capsys, "--device", "l4", *words)
    assert code == 2 and said["error"] == "SettingError"
