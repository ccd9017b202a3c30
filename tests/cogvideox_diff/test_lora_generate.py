"""Adapters in a pipeline and on the command line, with a tiny model in a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.__main__ import main
from cogvideox_diff.commands.generate import Configured
from cogvideox_diff.lora import adapter_names, fuse, inject, remove, save_lora
from cogvideox_diff.planning import CallSettings
from cogvideox_diff.transformer import ExpertTransformer
from shared.errors import SettingError, WeightsError
from shared.protocol import GenerationRequest
from shared.video_io import read_video
from tests.cogvideox_diff.tiny_lora import randomise
from tests.cogvideox_diff.tiny_pipeline import PROMPT, make, tiny_config, write_tokenizer

CALL = ("generate", "--prompt", PROMPT, "--device", "cpu", "--num_inference_steps", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    return make("2b", write_tokenizer(folder)).save_pretrained(folder / "model")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_for(tmp_path_factory.mktemp("adapter") / "a.safetensors")


def adapter_for(file: Path, **changes: Any) -> Path:
    """A strong adapter, of a model with some settings changed."""
    net = ExpertTransformer(replace(tiny_config("2b").transformer, **changes))
    inject(net, 2, 8.0)
    randomise(net)
    return save_lora(net, file)


def latents(pipeline: CogVideoXPipeline) -> torch.Tensor:
    return pipeline(PROMPT, num_inference_steps=2, output_type="latent")


# ---- pipeline


def test_a_pipeline_takes_adapters(model: Path, adapter: Path, tmp_path: Path) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(model, device="cpu")
    plain = latents(pipeline)
    assert "lora" not in pipeline.settings()
    report = pipeline.load_lora(adapter, scale=0)
    assert (report.matched, report.unmatched) == (8, ())
    assert torch.equal(latents(pipeline), plain)
    pipeline.load_lora(adapter, scale=0.5, name="style")
    assert pipeline.settings()["lora"] == {"default": 0.0, "style": 0.5}
    styled = latents(pipeline)
    assert (styled - plain).abs().max() > 0.01
    with pytest.raises(SettingError, match=r"adapters \(default, style\); fuse or remove"):
        pipeline.save_pretrained(tmp_path / "live")
    assert not (tmp_path / "live").exists()
    fuse(pipeline.parts.transformer)
    fused = CogVideoXPipeline.from_pretrained(pipeline.save_pretrained(tmp_path / "fused"), device="cpu")
    torch.testing.assert_close(latents(fused), styled, rtol=1e-3, atol=1e-3)


def test_a_refused_adapter_leaves_the_pipeline_as_it_was(model: Path, adapter: Path, tmp_path: Path) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(model, device="cpu")
    net = pipeline.parts.transformer
    with pytest.raises(WeightsError, match="layers 1, here 2"):
        pipeline.load_lora(adapter_for(tmp_path / "other.safetensors", num_layers=1))
    with pytest.raises(SettingError, match="finite"):
        pipeline.load_lora(adapter, scale=float("inf"))
    assert not adapter_names(net)
    pipeline.load_lora(adapter)
    with pytest.raises(SettingError, match="taken"):
        pipeline.load_lora(adapter)
    remove(net)
    assert "lora" not in pipeline.settings()


def test_progress_comes_from_the_steps(model: Path) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(model, device="cpu")
    seen: list[float] = []
    configured = Configured(
        pipeline, CallSettings(num_inference_steps=4), {"fps": 8.0}, on_progress=seen.append
    )
    configured.generate(GenerationRequest(prompt=PROMPT, seed=0))
    assert seen == [0.25, 0.5, 0.75, 1.0]  # also with guidance, which runs the model on both halves


# ---- the command


def generate(model: Path, output: Path, *argv: object) -> int:
    return main([*CALL, "--model_path", str(model), "--output_path", str(output), *map(str, argv)])


def test_generate_uses_an_adapter(model: Path, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    known, printed = {}, {}
    for name, flags in {
        "plain": (),
        "off": ("--lora_path", adapter, "--lora_scale", 0),
        "on": ("--lora_path", adapter),
        "both": ("--lora_path", adapter, "--lora-path", adapter, "--lora_scale", 0.75, "--lora_scale", 0.25),
    }.items():
        assert generate(model, tmp_path / f"{name}.mkv", *flags) in (0, 5)  # random frames may look frozen
        known[name] = json.loads((tmp_path / f"{name}.json").read_text())
        printed[name] = capsys.readouterr().err.splitlines()
    films = {name: read_video(tmp_path / f"{name}.mkv").frames for name in known}
    assert torch.equal(films["off"], films["plain"]) and not torch.equal(films["on"], films["plain"])
    assert len({entry["settings_hash"] for entry in known.values()}) == 4
    assert "lora" not in known["plain"]["settings"]
    (said,) = known["on"]["settings"]["lora"]
    assert (said["path"], said["scale"], said["matched"], said["unmatched"]) == (str(adapter), 1.0, 8, [])
    assert (said["ranks"], said["alphas"], len(said["digest"])) == ([2], [8.0], 16)
    assert [entry["scale"] for entry in known["both"]["settings"]["lora"]] == [0.75, 0.25]
    reports = {name: [line for line in lines if "matched" in line] for name, lines in printed.items()}
    reports = {name: [line for line in lines if "settings:" not in line] for name, lines in reports.items()}
    assert {name: len(lines) for name, lines in reports.items()} == {"plain": 0, "off": 1, "on": 1, "both": 2}
    assert reports["on"][0].startswith(f"{adapter} at scale 1: diffusers naming, rank 2, alpha 8 ")
    assert reports["on"][0].endswith("8 matched, 0 unmatched")


def test_parts_that_fit_nothing_are_always_told(
    model: Path, adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    tensors = load_file(adapter)
    for side in "AB":
        tensors[f"text_encoder.layer.q.lora_{side}.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "a.mkv"
    assert generate(model, out, "--quiet", "--lora_path", tmp_path / "a.safetensors") in (0, 5)
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("error: ")]
    assert len(told) == 1 and "8 matched, 1 unmatched (text_encoder.layer.q)" in told[0]
    known = json.loads(out.with_suffix(".json").read_text())
    assert known["settings"]["lora"][0]["unmatched"] == ["text_encoder.layer.q"]
    assert generate(model, tmp_path / "b.mkv", "--quiet", "--lora_path", adapter) in (0, 5)
    assert not [line for line in capsys.readouterr().err.splitlines() if not line.startswith("error: ")]


def test_a_wrong_adapter_is_refused_before_the_weights(
    model: Path, adapter: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CogVideoXPipeline, "from_pretrained", None)  # nothing below may get there
    deep = adapter_for(tmp_path / "deep.safetensors", num_layers=1)
    wide = adapter_for(tmp_path / "wide.safetensors", num_heads=3)
    save_file(load_file(wide), tmp_path / "bare.safetensors")  # shapes alone have to tell
    (tmp_path / "torn.safetensors").write_bytes(adapter.read_bytes()[:200])
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((deep,), 3, "made for another model (layers 1, here 2)"),
        ((wide,), 3, "width 48, here 32"),
        ((tmp_path / "bare.safetensors",), 3, "8 layers matched, 0 unmatched, 8 of another size"),
        ((tmp_path / "torn.safetensors",), 3, "truncated"),
        ((tmp_path / "nowhere",), 3, "nowhere"),
        ((model / "vae.safetensors",), 3, "holds no LoRA pairs"),
        ((adapter, "--lora_scale", 1, "--lora_scale", 2), 2, "got 2 for 1 --lora_path"),
    ]
    for flags, code, reason in cases:
        assert generate(model, tmp_path / "new" / "a.mkv", "--lora_path", *flags) == code
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1) and reason in printed.err, printed
    assert generate(model, tmp_path / "new" / "a.mkv", "--lora_scale", 1) == 2
    assert "got 1 for 0 --lora_path" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_verb(adapter: Path, model: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["lora", "inspect", str(adapter)]) == 0
    assert "rank: 2" in capsys.readouterr().out.splitlines()
    assert main(["lora", "inspect", str(adapter), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["exit_code"], said["pairs"], said["alpha"]) == (True, 0, 8, [8.0])
    weights, merged = model / "transformer.safetensors", tmp_path / "merged.safetensors"
    flags = ("--model-path", str(weights), "--output-path", str(merged), "--json")
    assert main(["lora", "merge", str(adapter), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["matched"] == 8
    before, after = load_file(weights), load_file(merged)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 8 and all(".attn." in name for name in changed)
    assert main(["lora", "merge", str(adapter), *flags[:-1]]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["lora", "inspect", str(weights), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["ok"] is False
