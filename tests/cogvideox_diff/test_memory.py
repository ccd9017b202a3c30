"""Memory savers of the pipeline: exact where they are said to be, chosen by known sizes, named in errors."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.config import PRESETS, CogVideoXConfig
from cogvideox_diff.memory import (
    OFFLOADS,
    Savers,
    advice,
    choose_savers,
    native_plan,
    net_bytes,
    resolve_savers,
    stage_needs,
)
from cogvideox_diff.model_files import PARTS, Part, empty_net, write_model
from cogvideox_diff.vae.blocks import Downsample, ResBlock, Upsample
from cogvideox_diff.vae.causal_conv import CausalConv3d
from shared.errors import OutOfMemoryError, SettingError
from shared.offload import Placement, Weights
from tests.cogvideox_diff.tiny_pipeline import PROMPT, clip, make, picture, tiny_config, write_tokenizer

GIB = 2**30
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(spiece: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return make("5b", spiece).save_pretrained(tmp_path_factory.mktemp("model"))


def force(pipe: CogVideoXPipeline, mode: str) -> CogVideoXPipeline:
    """Offload although the CPU computes."""
    pipe.engine.placement.mode = mode  # type: ignore[assignment]
    return pipe


# ---- offload


@pytest.mark.parametrize("mode", ["model", "sequential"])
@pytest.mark.parametrize(("variant", "task"), [("2b", "t2v"), ("5b", "v2v"), ("1.5-5b-i2v", "i2v")])
def test_offload_changes_nothing(spiece: Path, variant: str, task: str, mode: str) -> None:
    inputs: dict[str, Any] = {"i2v": {"image": picture()}, "v2v": {"video": clip()}}.get(task, {})
    pipe = make(variant, spiece)
    wanted = pipe(PROMPT, output_type="latent", **inputs), pipe(PROMPT, **inputs).frames
    force(pipe, mode)
    assert torch.equal(pipe(PROMPT, output_type="latent", **inputs), wanted[0])
    assert torch.equal(pipe(PROMPT, **inputs).frames, wanted[1])
    net = pipe.parts.transformer
    blocks, whole = Weights.of([net.blocks[0]]).nbytes, Weights.of([net]).nbytes
    held = max(pipe.engine.placement.peak_bytes, Weights.of([pipe.parts.vae]).nbytes)
    assert held >= whole - (blocks if mode == "sequential" else 0)


def test_every_layer_of_the_vae_computes_with_copies(spiece: Path) -> None:
    """What waits is on another device, unlike here."""
    pipe = force(make("5b", spiece), "sequential")
    vae, placement = pipe.parts.vae, pipe.engine.placement
    waiting = {x.data_ptr() for x in vae.parameters()}
    ran: dict[nn.Module, bool] = {}
    for part in vae.modules():
        if isinstance(part, ResBlock | Downsample | Upsample | CausalConv3d):
            part.register_forward_hook(
                lambda part, *call: ran.update(
                    {part: waiting.isdisjoint(x.data_ptr() for x in part.parameters())}
                )
            )
    pipe.codec.decode(pipe.codec.encode(clip()), fps=8)
    assert all(ran.values())
    assert {
        part for part in vae.modules() if isinstance(part, ResBlock | Downsample | Upsample)
    } <= ran.keys()
    assert placement.peak_bytes < 0.8 * Weights.of([vae]).nbytes


def test_offload_with_adapters(spiece: Path, tmp_path: Path) -> None:
    """Adapters are part of their block."""
    from cogvideox_diff import lora

    pipe = make("5b", spiece)
    lora.inject(pipe.parts.transformer, rank=2, alpha=2, generator=torch.Generator().manual_seed(0))
    for name, x in pipe.parts.transformer.named_parameters():
        if "lora" in name or "adapters" in name:
            x.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    wanted = pipe(PROMPT, output_type="latent")
    assert torch.equal(force(pipe, "sequential")(PROMPT, output_type="latent"), wanted)


def test_on_the_cpu_offload_is_none_and_says_so(folder: Path) -> None:
    pipe = CogVideoXPipeline.from_pretrained(folder, device="cpu", offload="auto")
    assert pipe.engine.placement.mode == "none"
    assert str(pipe.savers) == "offload none, no tiles (the CPU computes where weights wait)"
    with pytest.raises(SettingError, match="unknown offload 'gpu'; legal: none, model, sequential, auto"):
        CogVideoXPipeline.from_pretrained(folder, device="cpu", offload="gpu")


# ---- the choice


def light_5b(**vae: Any) -> CogVideoXConfig:
    """5B whose VAE has the released widths in fewer layers."""
    config = PRESETS["cogvideox-5b"]()
    return replace(config, vae=replace(config.vae, blocks_per_level=1, **vae))


def choice(free: float, **options: Any) -> Savers:
    config = options.pop("config", light_5b())
    return choose_savers(config, native_plan(config), BF16, free=int(free * GIB), **options)


def test_auto_takes_what_costs_least_and_fits() -> None:
    modes = [choice(free).offload for free in (80, 20, 11)]
    assert modes == ["none", "model", "sequential"]
    small = choice(5, tiling="auto")
    assert (small.offload, small.tiled) == ("sequential", True)
    assert not choice(80, tiling="auto").tiled  # what changes frames only where nothing exact fits
    with pytest.raises(OutOfMemoryError, match=r"^decode needs about .* 5\.00 GiB free; try --tiling on"):
        choice(5)
    assert choice(6, offload="model", config=PRESETS["cogvideox-demo"]()).offload == "model"


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "memory.md"


def test_documented_need() -> None:
    """5b's row of the table in docs/memory.md is what is predicted."""
    config = PRESETS["cogvideox-5b"]()
    plan, cells = native_plan(config), []
    ways = ((False, "none", OFFLOADS), (True, "none", OFFLOADS), (True, "int8", OFFLOADS[2:]))
    for tiled, quantize, modes in ways:
        needs = stage_needs(config, plan, BF16, tiled=tiled, quantize=quantize)
        whole = sum({need.net: need.weights for need in needs}.values())
        cells += [f"{max(need.total(mode, whole) for need in needs) / GIB:.1f}" for mode in modes]
    row = f"| 5b | {' | '.join(cells)} |"
    assert row in DOCUMENT.read_text(encoding="utf-8"), row


def test_pieces_shrink_last() -> None:
    config = light_5b(decode_latents=8, encode_frames=32)
    assert choice(80, config=config, chunk="auto", tiling="auto").decode_latents is None
    saved = choice(4, config=config, chunk="auto", tiling="auto")
    assert saved.tiled and saved.decode_latents == 4
    assert saved.vae(config.vae).decode_latents == saved.decode_latents
    assert saved.effects()["decode_latents"] == saved.decode_latents


def test_known_byte_counts() -> None:
    """2 bytes a parameter; T5-XXL's encoder has 4 762 310 656."""
    sizes = net_bytes(PRESETS["cogvideox-2b"](), BF16, "none")
    assert sizes["transformer"][0] == 2 * 1_693_783_872 and sizes["vae"][0] == 2 * 215_583_907
    assert sizes["text_encoder"][0] == 2 * 4_762_310_656
    assert all(streamed < 0.5 * whole for whole, streamed in sizes.values())
    quantized = net_bytes(PRESETS["cogvideox-2b"](), BF16, "int8")
    assert 0.5 < quantized["transformer"][0] / sizes["transformer"][0] < 0.56


def test_settings_that_do_not_exist() -> None:
    config, cpu = tiny_config("5b"), torch.device("cpu")
    with pytest.raises(SettingError, match="unknown vae_chunk '3'; legal: own, auto"):
        resolve_savers(config, cpu, BF16, vae_chunk="3")
    with pytest.raises(SettingError, match="unknown quantize 'int4'; legal: none, int8, fp8"):
        resolve_savers(config, cpu, BF16, quantize="int4")  # type: ignore[arg-type]


# ---- prompts


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *call: calls.append(1))
    return calls


def test_prompts_are_encoded_once(spiece: Path) -> None:
    pipe = make("5b", spiece)
    calls = count_calls(pipe.parts.text_encoder)
    alone = pipe(PROMPT, output_type="latent")
    assert len(calls) == 2  # the prompt and the one to guide away from
    pipe("a blue square")
    assert torch.equal(pipe(PROMPT, output_type="latent"), alone) and len(calls) == 3


def test_the_text_encoder_is_given_back_and_read_again(folder: Path, tmp_path: Path) -> None:
    pipe = CogVideoXPipeline.from_pretrained(folder, device="cpu")
    wanted = pipe(PROMPT, output_type="latent"), pipe("a blue square", output_type="latent")
    lean = force(CogVideoXPipeline.from_pretrained(folder, device="cpu"), "sequential")
    # To rounding: CPU products round by where a weight begins, which is elsewhere when it is read again.
    same = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4)
    same(lean(PROMPT, output_type="latent"), wanted[0])
    assert all(x.is_meta for x in lean.parts.text_encoder.parameters())
    same(lean(PROMPT, output_type="latent"), wanted[0])
    same(lean("a blue square", output_type="latent"), wanted[1])
    again = CogVideoXPipeline.from_pretrained(lean.save_pretrained(tmp_path / "saved"), device="cpu")
    same(again(PROMPT, output_type="latent"), wanted[0])


def test_prompts_prepared_ahead_need_the_encoder_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = force(CogVideoXPipeline.from_pretrained(folder, device="cpu"), "model")
    pipe.prepare([PROMPT, "a blue square", ""])
    monkeypatch.setattr(pipe.engine, "read_text_encoder", None)  # it is gone, and nothing can bring it back
    assert pipe(PROMPT).frames.shape == pipe("a blue square").frames.shape


def test_a_text_encoder_that_cannot_be_read_again_stays(spiece: Path) -> None:
    pipe = force(make("5b", spiece), "model")
    pipe(PROMPT)
    assert not next(pipe.parts.text_encoder.parameters()).is_meta
    with pytest.raises(SettingError, match="cannot be released"):
        pipe.engine.release_text_encoder()


# ---- running out


class Full(nn.Module):
    """In the place of a net whose memory does not suffice."""

    def __init__(self, message: str, net: nn.Module) -> None:
        super().__init__()
        self.message, self.net = message, net

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("net",) else getattr(self.net, name)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        raise RuntimeError(self.message)

    encode = decode = forward


ASKED = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes. Error code 12"


@pytest.mark.parametrize(
    ("net", "stage", "tried"),
    [
        ("text_encoder", "text", "--dtype bfloat16; then --quantize int8, fewer frames"),
        ("transformer", "model", "--dtype bfloat16; then --quantize int8, fewer frames"),
        ("vae", "decode", "--tiling on; then --dtype bfloat16, fewer frames"),
    ],
)
def test_the_stage_that_ran_out_is_named(spiece: Path, net: str, stage: str, tried: str) -> None:
    pipe = make("5b", spiece)
    full = Full(ASKED, getattr(pipe.parts, net))
    pipe.engine.parts = replace(pipe.parts, **{net: full})  # type: ignore[arg-type]
    with pytest.raises(OutOfMemoryError) as caught:
        pipe(PROMPT)
    start = f"out of memory in stage '{stage}' (asked for 3.00 GiB more); try {tried}"
    assert str(caught.value).startswith(start)


def test_advice_climbs_the_ladder() -> None:
    bf16 = {"dtype": BF16}
    assert advice("model", **bf16)[:3] == ["--offload model", "--offload sequential", "--quantize int8"]
    assert advice("model", offload="model", quantize="int8", **bf16)[0] == "--offload sequential"
    assert advice("decode", **bf16)[:2] == ["--tiling on", "--offload model"]
    assert advice("decode", offload="sequential", tiled=True, **bf16)[0] == "--vae_chunk auto"
    assert advice("loading", dtype=torch.float32) == [
        "--dtype bfloat16",
        "--quantize int8",
        "a smaller model",
    ]


def test_the_command_line_ends_with_4(folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from cogvideox_diff.__main__ import main
    from cogvideox_diff.vae.autoencoder import CausalVAE

    monkeypatch.setattr(CausalVAE, "decode", lambda *args, **options: Full(ASKED, nn.Module())())
    path = tmp_path / "a.mp4"
    words = ["generate", "--model_path", str(folder), "--device", "cpu", "--prompt", PROMPT, "--json"]
    assert main([*words, "--output_path", str(path), "--offload", "auto"]) == 4
    said = json.loads(capsys.readouterr().out)
    assert said["exit_code"] == 4 and "stage 'decode'" in said["reason"] and "--tiling on" in said["reason"]
    assert not path.exists()


# ---- 8 bits


@pytest.mark.parametrize(("mode", "limit"), [("int8", 0.03), ("fp8", 0.12)])
def test_quantized(folder: Path, mode: Any, limit: float, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="extra quant")
    plain = CogVideoXPipeline.from_pretrained(folder, device="cpu")
    wanted = plain(PROMPT, output_type="latent")
    pipe = CogVideoXPipeline.from_pretrained(folder, device="cpu", quantize=mode)
    got = pipe(PROMPT, output_type="latent")
    assert 0 < float((got - wanted).norm() / wanted.norm()) < limit
    nets = (plain.parts.transformer, pipe.parts.transformer)
    before, after = (Weights.of([net.blocks[0].attn]).nbytes for net in nets)  # type: ignore[union-attr]
    assert after < 0.5 * before
    assert torch.equal(force(pipe, "sequential")(PROMPT, output_type="latent"), got)
    with pytest.raises(SettingError, match="quantized"):
        pipe.save_pretrained(tmp_path)


def test_without_torchao(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(SettingError, match=r"--quantize needs torchao .*cogvideo-lab\[quant\]"):
        CogVideoXPipeline.from_pretrained(folder, device="cpu", quantize="int8")


# ---- loading


MEASURE = """
import json, sys, torch
from pathlib import Path
from cogvideox_diff.formats import open_folder, load_parts
from cogvideox_diff.model_files import PARTS, empty_net
from shared.memory import peak_resident_bytes
from shared.offload import Weights
folder = open_folder(sys.argv[1])
for part in PARTS:
    empty_net(part, folder.config)
for dtype in (torch.bfloat16, torch.float32):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what there is
    base = peak_resident_bytes()
    parts = load_parts(folder, dtype)
    nets = [getattr(parts, part) for part in PARTS]
    for net in nets:
        for x in net.parameters():
            x.sum()
    print(json.dumps([peak_resident_bytes() - base, Weights.of(nets).nbytes]))
    del parts, nets, net, x
"""


def eighth_gib_config() -> CogVideoXConfig:
    config = tiny_config("5b")
    net = replace(config.transformer, num_layers=5, num_heads=16, head_dim=64)
    return replace(config, transformer=net)


def random_part(part: Part, config: CogVideoXConfig) -> dict[str, torch.Tensor]:
    shapes = {name: x.shape for name, x in empty_net(part, config).state_dict().items()}
    return {name: torch.full(shape, 0.01, dtype=BF16) for name, shape in shapes.items()}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of resident memory")
def test_loading_takes_the_weights_size(spiece: Path, tmp_path: Path) -> None:
    """As stored, and cast while they are read; every page of the weights is looked at."""
    config = eighth_gib_config()
    assert len(PARTS) == 3
    write_model(
        tmp_path,
        "diffusers",
        config,
        lambda part: random_part(part, config),
        spiece,
        run="bfloat16",
        shard_bytes=2**25,
    )
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) >= 4
    words = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    measured = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(measured) == 2
    for (peak, weights), size in zip(measured, (2, 4), strict=True):
        assert weights > size * 60e6
        assert peak < 1.15 * weights, f"{size} bytes a weight: {peak / weights:.3f}"


def test_placement_of_a_pipeline_is_the_engines(spiece: Path) -> None:
    pipe = make("5b", spiece)
    assert isinstance(pipe.engine.placement, Placement) and pipe.codec.placement is pipe.engine.placement
