"""The cost model of CogVideoX: operations against torch's counter, memory against what real runs hold."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from cogvideox_diff.__main__ import main
from cogvideox_diff.config import PRESETS, CogVideoXConfig, VAEConfig, cogvideox_5b, cogvideox_demo
from cogvideox_diff.costs import decode_parts, encode_parts, stage_costs, text_parts, transformer_parts
from cogvideox_diff.guidance import Predictor
from cogvideox_diff.memory import MARGIN as MARGIN_OF_OFFLOADING
from cogvideox_diff.memory import RESERVE as RESERVE_OF_OFFLOADING
from cogvideox_diff.memory import stage_needs
from cogvideox_diff.planning import CallSettings, Plan, check_request
from cogvideox_diff.text_encoder import T5TextEncoder
from cogvideox_diff.transformer import ExpertTransformer
from cogvideox_diff.vae import fast
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.costs import DEVICES, GIB, MARGIN, RESERVE, repeated, total_flops
from shared.memory import peak_bytes
from tests.cogvideox_diff.tiny_pipeline import tiny_config
from tests.shared.counting import counted_flops

VARIANTS = ("2b", "5b", "5b-i2v", "1.5", "1.5-i2v")
CONFIGS: dict[str, CogVideoXConfig] = {"demo": cogvideox_demo(), **{v: tiny_config(v) for v in VARIANTS}}
META = torch.device("meta")


def call(config: CogVideoXConfig, **settings: Any) -> Plan:
    geometry = config.geometry
    image = torch.zeros(geometry.height, geometry.width, 3, dtype=torch.uint8)
    needs_image = config.transformer.in_channels > config.transformer.out_channels
    return check_request(config, CallSettings(**settings), image=image if needs_image else None)


# ---- operations


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_the_transformer_has_the_counters_operations(name: str):
    config = CONFIGS[name]
    net, plan = config.transformer, call(config)
    model = ExpertTransformer(net)
    x = torch.randn(2, *plan.geometry.latent_shape(net.in_channels))
    text, times = torch.randn(2, net.text_len, net.text_dim), torch.tensor([5.0, 5.0])
    counted = counted_flops(lambda: model(x, text, times, times))
    parts = transformer_parts(net, plan.geometry.grid, 2, 4)
    assert total_flops(parts) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b", "cogvideox-1.5-5b-i2v"])
def test_a_step_at_full_size_has_the_counters_operations(name: str):
    """Two layers of it, on the meta device."""
    config = PRESETS[name]()
    net = replace(config.transformer, num_layers=2)
    shape = call(config).geometry.latent_shape(net.in_channels)
    with META:
        model = ExpertTransformer(net).bfloat16()
        x, times = torch.empty(2, *shape, dtype=torch.bfloat16), torch.empty(2)
        text = torch.empty(2, net.text_len, net.text_dim, dtype=torch.bfloat16)
    counted = counted_flops(lambda: model(x, text, times, times))
    parts = transformer_parts(net, call(config).geometry.grid, 2, 2)
    assert total_flops(parts) == pytest.approx(counted, rel=0.001)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_text_encoder_has_the_counters_operations(name: str):
    config = CONFIGS[name].text
    net = T5TextEncoder(config).eval()
    ids = torch.zeros(3, config.text_len, dtype=torch.long)
    assert total_flops(text_parts(config, 3, 4)) == pytest.approx(counted_flops(lambda: net(ids)), rel=0.01)


@pytest.mark.parametrize(
    ("name", "frames", "tiled"), [("demo", 9, False), ("5b", 9, False), ("5b", 13, True)]
)
def test_the_vae_has_the_counters_operations(name: str, frames: int, tiled: bool):
    """In float64, which takes no path of its own."""
    config = replace(CONFIGS[name].vae, sample_size=(48, 64))
    vae = CausalVAE(config).double()
    pixels = torch.randn(1, 3, frames, 40, 48, dtype=torch.float64)
    z = torch.randn(1, config.latent_channels, (frames + 3) // 4, 5, 6, dtype=torch.float64)
    encoded = total_flops(encode_parts(config, (frames, 40, 48), 8, tiled=tiled))
    decoded = total_flops(decode_parts(config, (z.shape[2], 5, 6), 8, tiled=tiled))
    assert encoded == pytest.approx(counted_flops(lambda: vae.encode(pixels, tiled=tiled)), rel=0.01)
    assert decoded == pytest.approx(counted_flops(lambda: vae.decode(z, tiled=tiled)), rel=0.01)


@pytest.mark.parametrize("rule", ["odd_count", "first_piece", "never"])
def test_even_latent_counts_are_counted_by_their_rule(rule: Any):
    config = replace(CONFIGS["5b"].vae, single_frame=rule)
    vae, z = CausalVAE(config).double(), torch.randn(1, 4, 4, 4, 6, dtype=torch.float64)
    counted = counted_flops(lambda: vae.decode(z))
    assert total_flops(decode_parts(config, (4, 4, 6), 8)) == pytest.approx(counted, rel=0.01)


def test_the_full_vae_has_the_counters_operations():
    config = cogvideox_5b().vae
    with META:
        vae = CausalVAE(config).half()
        z = torch.empty(1, 16, 5, 60, 90, dtype=torch.float16)
    counted = counted_flops(lambda: vae.decode(z))
    assert total_flops(decode_parts(config, (5, 60, 90), 2)) == pytest.approx(counted, rel=0.001)


# ---- memory: what tensors hold at once in a real run on the CPU, without the weights


VAE = VAEConfig(widths=(32, 32, 32, 64), blocks_per_level=1, norm_groups=8, sample_size=(64, 96))
SMALL = replace(
    tiny_config("5b"),
    vae=replace(VAE, latent_channels=4),
    transformer=replace(tiny_config("5b").transformer, num_layers=3, num_heads=4),
)
RUN_DTYPE = torch.bfloat16


def work_of(config: CogVideoXConfig, stage: str, plan: Plan, *, tiled: bool = False) -> int:
    needs = stage_needs(config, plan, RUN_DTYPE, tiled=tiled)
    return next(need.work for need in needs if need.stage == stage)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Winograd's algorithm and in a GPU's strips."""
    monkeypatch.setattr(fast, "winograd_pays", lambda conv, x: False)
    monkeypatch.setattr(fast, "HALF_BY_WINOGRAD_ONLY", ())
    monkeypatch.setattr(fast, "STRIP_BYTES", {})
    monkeypatch.setattr(fast, "BLOCKS", {})


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("pieces", [0, 2])
@pytest.mark.parametrize("tiled", [False, True])
def test_decoding_holds_what_is_predicted(pieces: int, tiled: bool):
    config = replace(SMALL, vae=replace(SMALL.vae, decode_latents=pieces))
    plan = call(config, num_frames=17)
    vae = CausalVAE(config.vae).to(RUN_DTYPE)
    z = torch.randn(1, 4, 5, *plan.geometry.latent_size, dtype=RUN_DTYPE)
    measured = peak_bytes(lambda: vae.decode(z, tiled=tiled))
    assert work_of(config, "decode", plan, tiled=tiled) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_a_step_holds_what_is_predicted(guidance: float):
    plan = call(SMALL, num_frames=17, guidance_scale=guidance)
    net = SMALL.transformer
    model = ExpertTransformer(net).to(RUN_DTYPE)
    text = torch.randn(1, net.text_len, net.text_dim, dtype=RUN_DTYPE)
    x = torch.randn(1, *plan.geometry.latent_shape(4), dtype=RUN_DTYPE)
    predict = Predictor(model=model, text=text, negative=text if plan.guided else None)
    measured = peak_bytes(lambda: predict(x, 999)) + 6 * 4 * x.numel()  # the sampler's states
    assert work_of(SMALL, "model", plan) == pytest.approx(measured, rel=0.15)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_encoding_holds_what_is_predicted():
    from shared.video import Video

    video = Video(frames=torch.zeros(17, 32, 48, 3, dtype=torch.uint8), fps=8)
    plan = check_request(SMALL, CallSettings(num_frames=17), video=video)
    vae = CausalVAE(SMALL.vae).to(RUN_DTYPE)
    pixels = torch.randn(1, 3, 17, 32, 48, dtype=RUN_DTYPE)
    measured = pixels.numel() * 2 + peak_bytes(lambda: vae.encode(pixels))
    assert work_of(SMALL, "encode", plan) == pytest.approx(measured, rel=0.15)


def test_costs_and_offloading_know_one_peak():
    assert (MARGIN, RESERVE) == (MARGIN_OF_OFFLOADING, RESERVE_OF_OFFLOADING)
    config = cogvideox_demo()
    needs = stage_needs(config, call(config), torch.float32)
    costs = stage_costs(config, call(config), torch.float32)
    for mode in ("none", "model", "sequential"):
        assert [c.peak(mode, 99) for c in costs] == [n.total(mode, 99) for n in needs]


def test_decoding_49_frames_of_480x720_in_float16():
    """Pieces take a fourth of the whole clip's memory, pieces of tiles less than 6 GiB."""
    config = replace(cogvideox_5b(), text=cogvideox_demo().text, transformer=cogvideox_demo().transformer)
    config = replace(config, vae=replace(config.vae, latent_channels=16))
    plan, half = call(config, num_frames=None), torch.float16

    def work(tiled: bool, **pieces: int) -> float:
        tried = replace(config, vae=replace(config.vae, **pieces))
        needs = stage_needs(tried, plan, half, tiled=tiled)
        return next(need.work + need.weights for need in needs if need.stage == "decode") / GIB

    assert plan.geometry.num_frames == 49 and plan.geometry.size == (480, 720)
    assert work(tiled=True) < 6
    assert work(tiled=False) < 9


# ---- seconds


@pytest.mark.parametrize(
    ("preset", "device", "seconds"),
    [
        ("cogvideox-2b", "a100-80", 90),
        ("cogvideox-5b", "a100-80", 180),
        ("cogvideox-1.5-5b", "a100-80", 1000),
    ],
)
def test_the_predicted_time_is_near_the_published_one(preset: str, device: str, seconds: float):
    """50 steps, by the authors' own table."""
    config = PRESETS[preset]()
    step = transformer_parts(config.transformer, call(config).geometry.grid, 2, 2)
    predicted = DEVICES[device].seconds(repeated(step, 50), torch.bfloat16)
    assert predicted == pytest.approx(seconds, rel=0.25)


# ---- the verb


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["plan", "--preset", "cogvideox-demo", "--device", "l4", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_plan_says_all_of_every_stage(capsys: pytest.CaptureFixture[str]):
    code, said = plan(capsys, "--num-inference-steps", "7")
    assert code == 0 and [s["stage"] for s in said["stages"]] == ["text", "model", "decode"]
    assert said["stages"][1]["steps"] == 7
    assert all(s[name] > 0 for s in said["stages"] for name in ("flops", "weights_bytes", "peak_bytes"))
    assert said["disk"]["video_at_most_bytes"] == 17 * 64 * 64 * 3
    assert said["seconds"] == pytest.approx(sum(s["seconds"] for s in said["stages"]))


def test_plan_refuses_what_never_fits(capsys: pytest.CaptureFixture[str]):
    code, said = plan(capsys, "--memory", "0.5")
    assert code == 4 and not said["ok"] and "nothing fits into 512.00 MiB" in said["reason"]
    assert any("--num_frames" in rung["flags"] for rung in said["ladder"])


def test_the_ladder_changes_nothing_but_time_before_it_changes_frames(capsys: pytest.CaptureFixture[str]):
    _, said = plan(capsys, "--memory", "0.5")
    flags = [rung["flags"] for rung in said["ladder"]]
    assert flags[:3] == ["", "--offload model", "--offload sequential"]
    assert flags[3:6] == [f"{words} --tiling on".strip() for words in flags[:3]]
    assert "--quantize int8" in flags[6] or "--dtype" in flags[6]


@pytest.mark.parametrize("words", [["--num_frames", "10"], ["--device", "h300"], ["--memory", "0"]])
def test_plan_refuses_illegal_settings(capsys: pytest.CaptureFixture[str], words: list[str]):
    code, said = plan(capsys, *words)
    assert code == 2 and said["error"] == "SettingError"


def test_savers_that_were_asked_for_are_kept_in_the_ladder(capsys: pytest.CaptureFixture[str]):
    _, said = plan(capsys, "--memory", "0.5", "--offload", "sequential", "--dtype", "bfloat16")
    assert not any("--offload" in rung["flags"] or "--dtype" in rung["flags"] for rung in said["ladder"])
