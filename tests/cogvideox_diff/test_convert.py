"""The verb `convert`: every variant through every layout and back, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvideox_diff.__main__ import main
from cogvideox_diff.commands.convert import LAYOUTS, convert_model
from cogvideox_diff.config import PRESETS
from cogvideox_diff.formats import open_folder
from cogvideox_diff.model_files import PARTS, empty_net, read_part, save_shards
from cogvideox_diff.pipeline import CogVideoXPipeline
from cogvideox_diff.sat_layout import sat_tables
from shared.checkpoints import invert, load_tensors
from shared.errors import OutputPathError, WeightsError
from tests.cogvideox_diff.tiny_pipeline import make, write_tokenizer
from tests.parity.cogvideox.test_transformer import RELEASED
from tests.parity.cogvideox.tiny_sat import case_names, from_diffusers, read_case
from tests.parity.recorded import case_folder, read_json

VARIANTS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def save(variant: str, spiece: Path, folder: Path, dtype: str = "bfloat16") -> Path:
    """A tiny model in our layout; in bfloat16, so that a detour through another type would show."""
    return make(variant, spiece).save_pretrained(folder, dtype=dtype)


def content(folder: Path) -> dict[str, Tensor]:
    opened = open_folder(folder)
    return {f"{part}/{name}": x for part in PARTS for name, x in read_part(opened, part).items()}


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if got[name].dtype != wanted[name].dtype] == []
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips(variant: str, spiece: Path, tmp_path: Path) -> None:
    """ours -> diffusers -> sat -> diffusers -> ours -> sat -> ours: all six directions but the identities."""
    first = save(variant, spiece, tmp_path / "first")
    wanted, config = content(first), open_folder(first).config
    tour = ("diffusers", "sat", "diffusers", "ours", "sat", "ours")
    folder = first
    for number, to in enumerate(tour):
        target = tmp_path / f"{number}-{to}"
        result = convert_model(folder, target, to=to, shard_gb=2e-5)
        assert result["parts"]["transformer"]["tensors"] == sum(name.startswith("tr") for name in wanted)
        assert open_folder(target).layout == to and open_folder(target).config == config
        assert_equal(content(target), wanted)
        folder = target
    loaded = CogVideoXPipeline.from_pretrained(folder, device="cpu")
    assert loaded.config == config and loaded.engine.tokenizer.text_len == config.text.text_len


@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts_without_our_configuration(variant: str, spiece: Path, tmp_path: Path) -> None:
    """What only the other code's files say is enough to find the tensors again."""
    first = save(variant, spiece, tmp_path / "first")
    for to in ("diffusers", "sat"):
        convert_model(first, tmp_path / to, to=to)
        (tmp_path / to / "cogvideox_diff.json").unlink()
    assert_equal(content(tmp_path / "diffusers"), content(first))
    sat = open_folder(tmp_path / "sat", open_folder(first).config)
    assert_equal(dict(read_part(sat, "transformer")), dict(read_part(open_folder(first), "transformer")))


def test_parts_in_shards(spiece: Path, tmp_path: Path) -> None:
    convert_model(save("5b", spiece, tmp_path / "m"), tmp_path / "d", to="diffusers", shard_gb=2e-5)
    index = read_json(tmp_path / "d" / "transformer" / "diffusion_pytorch_model.safetensors.index.json")
    shards = sorted((tmp_path / "d" / "transformer").glob("*.safetensors"))
    tensors = [load_file(path) for path in shards]
    assert len(shards) > 1 and {path.name for path in shards} == set(index["weight_map"].values())
    assert all(sum(x.nbytes for x in shard.values()) <= 2e4 or len(shard) == 1 for shard in tensors)
    assert index["metadata"]["total_size"] == sum(x.nbytes for shard in tensors for x in shard.values())
    assert sorted(index["weight_map"]) == sorted(name for shard in tensors for name in shard)


def test_shards_hold_what_is_larger_than_a_shard(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.ones(100), "c": torch.ones(2)}
    assert len(save_shards(tensors, tmp_path, "model", 20)) == 3
    assert_equal(load_tensors(tmp_path), tensors)


@pytest.mark.peers
def test_diffusers_loads_shards(spiece: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = save("5b-i2v", spiece, tmp_path / "m", dtype="float32")
    convert_model(folder, tmp_path / "d", to="diffusers", shard_gb=2e-5)
    peer = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "d", subfolder="transformer")
    stored = load_tensors(tmp_path / "d" / "transformer")
    assert peer.state_dict().keys() == stored.keys()
    assert [name for name, x in peer.state_dict().items() if not torch.equal(x.float(), stored[name])] == []


# ---- SAT's fixed tables


@pytest.mark.parity
@pytest.mark.parametrize("released", RELEASED)
def test_sat_files_have_the_released_names_and_shapes(released: str) -> None:
    """At full size, without memory: what is written is what the release holds, nothing more or less."""
    from cogvideox_diff.checkpoints import sat_transformer_table

    entry = read_json(case_folder("cogvideox") / "manifests" / "sat_keys.json")[released]
    wanted = dict(entry["global_tensors"])
    for layer in range(entry["num_layers"]):
        wanted |= {name.replace("{i}", str(layer)): x for name, x in entry["per_layer_tensors"].items()}
    config = PRESETS[RELEASED[released]]()
    ours = empty_net("transformer", config).state_dict()
    with torch.device("meta"):
        tables = sat_tables(config.transformer)
    written = invert(ours, sat_transformer_table(config.transformer)) | tables
    assert {name: list(x.shape) for name, x in written.items()} == wanted


@pytest.mark.parity
@pytest.mark.parametrize("name", case_names())
def test_sat_tables_are_the_recorded_ones(name: str) -> None:
    case = read_case(name)
    config = from_diffusers(case.meta["diffusers_config"], final_norm_eps=1e-6)
    recorded = load_tensors(case.folder / "transformer")
    for key, table in sat_tables(config).items():
        if "position_embeddings" in key:  # read by nothing
            continue
        wanted = recorded[key].float()
        used = table if table.shape[0] == 1 else table[: len(wanted)]
        assert used.shape == wanted.shape and (used - wanted).abs().max() < 1e-5, key


# ---- refusals


def test_convert_is_strict(spiece: Path, tmp_path: Path) -> None:
    folder = save("5b", spiece, tmp_path / "m")
    file = folder / "transformer.safetensors"
    tensors = load_file(file)
    for name, changed, reason in (
        ("extra", {**tensors, "blocks.9.gate": torch.ones(1)}, "1 unexpected"),
        ("missing", {k: x for k, x in tensors.items() if k != "proj_out.bias"}, "1 missing"),
        ("shape", {**tensors, "proj_out.bias": torch.ones(3)}, "1 of another shape"),
    ):
        save_file(changed, file)
        with pytest.raises(WeightsError, match=reason):
            convert_model(folder, tmp_path / name, to="sat")
        assert not (tmp_path / name).exists()


def test_convert_leaves_a_whole_folder_or_none(
    spiece: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save("5b", spiece, tmp_path / "m")
    kept = convert_model(folder, tmp_path / "out", to="sat")
    assert kept["bytes"] == sum(part["bytes"] for part in kept["parts"].values())

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cogvideox_diff.model_files._write_settings", fail)
    with pytest.raises(OutputPathError, match="No space left"):
        convert_model(folder, tmp_path / "out", to="diffusers", overwrite=True)
    assert open_folder(tmp_path / "out").layout == "sat"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_a_full_disk_is_seen_first(spiece: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("5b", spiece, tmp_path / "m")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("cogvideox_diff.commands.convert.shutil.disk_usage", lambda _path: usage)
    with pytest.raises(OutputPathError, match="are free there"):
        convert_model(folder, tmp_path / "out", to="ours")


def test_the_command(spiece: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save("2b", spiece, tmp_path / "m")
    words = ["convert", "--model_path", str(folder), "--output_path"]
    assert main([*words, str(tmp_path / "s"), "--to", "sat", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["layouts"], said["dry_run"]) == (["ours", "sat"], False)
    assert main([*words, str(tmp_path / "d"), "--to", "diffusers", "--dry-run"]) == 0
    assert "would write" in capsys.readouterr().out and not (tmp_path / "d").exists()
    assert main([*words, str(tmp_path / "f"), "--to", "ours", "--dtype", "fp32"]) == 0
    assert {x.dtype for x in content(tmp_path / "f").values()} == {torch.float32}
    capsys.readouterr()
    cases = [
        ([str(tmp_path / "s"), "--to", "sat"], 2, "already exists"),
        ([str(folder), "--to", "sat", "--overwrite"], 2, "where the model is read from"),
        ([str(tmp_path / "x"), "--to", "sta"], 2, f"(nearest: 'sat'); legal: {', '.join(LAYOUTS)}"),
        ([str(tmp_path / "x"), "--to", "sat", "--dtype", "int4"], 2, "unknown dtype 'int4'"),
        ([str(tmp_path / "x"), "--to", "diffusers", "--shard_gb", "0"], 2, "must be positive, got 0"),
    ]
    for arguments, code, reason in cases:
        assert main([*words, *arguments]) == code
        printed = capsys.readouterr().err
        assert reason in printed and printed.count("\n") == 1


def test_a_model_that_diffusers_cannot_compute(spiece: Path, tmp_path: Path) -> None:
    pipe = make("5b", spiece)
    net = replace(pipe.config.transformer, mlp_ratio=2)
    other = make("5b", spiece, transformer=net)
    folder = other.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="MLP ratio of 4"):
        convert_model(folder, tmp_path / "d", to="diffusers")
