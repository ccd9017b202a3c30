"""The verb `lora`: inspect, merge, and its flags."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER, sat_transformer_table
from cogvideox_diff.commands import lora as lora_command
from cogvideox_diff.config import PRESETS
from cogvideox_diff.lora import linear_layers, save_lora, set_scale
from cogvideox_diff.lora_files import Adapter, Pair, write_adapter
from cogvideox_diff.transformer import ExpertTransformer
from shared.checkpoints import convert, invert, load_into
from shared.errors import OutputPathError, SettingError, WeightsError
from tests.cogvideox_diff.tiny_lora import adapted_model, run, tiny_model
from tests.parity.cogvideox.tiny_sat import relative_error


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    lora_command.add_arguments(parser)
    return parser.parse_args(arguments)


def preset_adapter(preset: str, rank: int = 1) -> Adapter:
    """Adapters of the right shapes for a full-size model."""
    with torch.device("meta"):
        layers = linear_layers(ExpertTransformer(PRESETS[preset]().transformer))
    pairs = {
        path: Pair(
            down=torch.zeros(rank, layer.in_features), up=torch.zeros(layer.out_features, rank), alpha=1.0
        )
        for path, layer in layers.items()
        if path.endswith(("attn.q", "attn.out"))
    }
    return Adapter(pairs=pairs)


def test_inspect_says_what_a_file_is(tmp_path: Path) -> None:
    file = write_adapter(preset_adapter("cogvideox-2b"), tmp_path / "a.safetensors")
    said = lora_command.act(options("inspect", str(file)))
    assert said["fits"] == {"cogvideox-2b": 60}
    assert (said["rank"], said["targets"], said["pairs"]) == ([1], ["attn.out", "attn.q"], 60)
    said = lora_command.act(options("inspect", str(file), "--preset", "cogvideox-2b"))
    assert (said["matched"], said["unmatched"]) == (60, [])
    assert "matched: 60" in lora_command.lines_of(said)
    assert "fits: none" in lora_command.lines_of(said | {"fits": {}})
    with pytest.raises(WeightsError, match="60 layers matched, 0 unmatched, 60 of another size"):
        lora_command.act(options("inspect", str(file), "--preset", "cogvideox-5b"))


@pytest.mark.parametrize("naming", ["own", "joint", "diffusers", "sat"])
def test_merge_into_every_naming(tmp_path: Path, naming: str) -> None:
    model = adapted_model()
    save_lora(model, tmp_path / "lora")
    tables = {"diffusers": DIFFUSERS_TRANSFORMER, "sat": sat_transformer_table(model.config)}
    weights = tiny_model().state_dict()
    if naming in tables:
        weights = invert(weights, tables[naming])
    elif naming == "joint":
        weights = {f"transformer.{k}": v for k, v in weights.items()} | {"text_encoder.x": torch.ones(1)}
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "base.safetensors")
    arguments = ("merge", str(tmp_path / "lora"), "--model_path", str(tmp_path / "base.safetensors"))
    arguments += ("--output_path", str(tmp_path / "merged.safetensors"), "--lora_scale", "0.5")
    said = lora_command.act(options(*arguments))
    assert (said["matched"], said["scale"]) == (8, 0.5)
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == weights.keys()
    if naming in tables:
        merged = convert(merged, tables[naming])
    elif naming == "joint":
        merged = {k.removeprefix("transformer."): v for k, v in merged.items() if k != "text_encoder.x"}
    set_scale(model, 0.5)
    assert relative_error(run(load_into(tiny_model(seed=3), merged)), run(model)) < 1e-5
    with pytest.raises(OutputPathError, match="already exists"):
        lora_command.act(options(*arguments))


def test_merge_into_a_diffusers_folder(tmp_path: Path) -> None:
    save_lora(adapted_model(), tmp_path / "lora")
    base = tmp_path / "base"
    base.mkdir()
    weights = invert(tiny_model().state_dict(), DIFFUSERS_TRANSFORMER)
    save_file({k: v.contiguous() for k, v in weights.items()}, base / lora_command.WEIGHTS_FILE)
    (base / "config.json").write_text("{}")
    said = lora_command.merge_files(tmp_path / "lora", tmp_path / "out", base=base)
    assert Path(said["output"]) == tmp_path / "out" / lora_command.WEIGHTS_FILE
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_merge_refuses(tmp_path: Path) -> None:
    file = save_lora(adapted_model(), tmp_path / "lora")
    save_file(tiny_model(num_heads=3).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(WeightsError, match="width 32, here 48"):
        lora_command.merge_files(file, tmp_path / "m", base=tmp_path / "wide.safetensors")
    with pytest.raises(SettingError, match="without its base"):
        lora_command.merge_files(file, tmp_path / "m")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="no CogVideoX transformer"):
        lora_command.merge_files(file, tmp_path / "m", base=tmp_path / "other.safetensors")
    assert not (tmp_path / "m").exists()


def test_missing_flags() -> None:
    with pytest.raises(SettingError, match="--output_path"):
        lora_command.act(options("convert", "x", "--to", "sat"))
    with pytest.raises(SettingError, match="--to"):
        lora_command.act(options("convert", "x", "--output_path", "y"))
