"""The verb `doctor` on folders of the released sizes (files with holes), and on adapters;
every next step that it proposes is one that the program takes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cogvideox_diff import model_files
from cogvideox_diff.__main__ import main
from cogvideox_diff.config import PRESETS
from cogvideox_diff.delta import DELTA
from cogvideox_diff.formats import DEMOS
from cogvideox_diff.model_files import Part, empty_net, write_model
from tests.cogvideox_diff.tiny_pipeline import make, write_tokenizer
from tests.shared.sparse_files import check_command, write_safetensors, write_sat, write_torch


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, layout, type) -> its folder; made once."""
    made: dict[tuple, Path] = {}
    patch = pytest.MonkeyPatch()
    for name, writer in (
        ("save_tensors", write_safetensors),
        ("save_sat", write_sat),
        ("save_torch", write_torch),
    ):
        patch.setattr(model_files, name, writer)

    def write(name: str, layout: str, dtype: torch.dtype) -> Path:
        if (name, layout, dtype) not in made:
            folder, config = tmp_path_factory.mktemp("released") / name, PRESETS[name]()

            def tensors(part: Part) -> dict[str, Tensor]:
                state = empty_net(part, config).state_dict()
                return {key: torch.empty(x.shape, dtype=dtype, device="meta") for key, x in state.items()}

            patch.setattr(model_files, "sat_tables", lambda config: {})
            write_model(folder, layout, config, tensors, DEMOS["demo"] / "tokenizer", run="bfloat16")  # type: ignore
            (folder / "cogvideox_diff.json").unlink()  # as released
            made[name, layout, dtype] = folder
        return made[name, layout, dtype]

    yield write
    patch.undo()


@pytest.fixture
def released(written: Any, tmp_path: Path) -> Any:
    """The same, as links that a test may replace."""

    def copy(name: str, layout: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        target = tmp_path / "model"
        shutil.copytree(written(name, layout, dtype), target, copy_function=os.link)
        return target

    return copy


def said(capsys: pytest.CaptureFixture[str], code: int, *words: str | Path) -> dict:
    assert main(["doctor", *map(str, words), "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    for step in (found["next"], found["use"], *(finding["next"] for finding in found["findings"])):
        assert not step or check_command(step)
    return found


def reasons(found: dict) -> str:
    return " | ".join(f"{x['level']}: {x['reason']}" for x in found["findings"])


# ---- whole folders


def test_a_released_folder_is_told_with_the_command_that_uses_it(released: Any, capsys: Any):
    found = said(capsys, 0, released("cogvideox-5b", "diffusers"))
    assert (found["verdict"], found["layout"], found["model"]) == ("good", "diffusers", "cogvideox-5b")
    assert found["next"].startswith("cogvideox generate")


def test_a_sat_folder(released: Any, capsys: Any):
    folder = released("cogvideox-2b", "sat", torch.float16)
    found = said(capsys, 0, folder)
    assert (found["verdict"], found["layout"], found["model"]) == ("good", "sat", "cogvideox-2b")
    assert said(capsys, 0, folder / "transformer")["model"] == "cogvideox-2b, transformer alone"
    assert said(capsys, 0, folder / "vae" / "3d-vae.pt")["next"] == f"cogvideox doctor {folder}"
    (folder / "transformer" / "latest").write_text("7")
    assert "named by" in reasons(said(capsys, 3, folder))


def test_the_image_model_is_given_an_image(released: Any, capsys: Any):
    found = said(capsys, 0, released("cogvideox-5b-i2v", "diffusers"))
    assert found["model"] == "cogvideox-5b-i2v" and "--image_or_video_path" in found["next"]


def test_types_that_spoil_results(released: Any, capsys: Any):
    folder = released("cogvideox-5b", "diffusers", torch.float16)
    found = said(capsys, 0, folder)
    assert found["verdict"] == "risky" and "leave float16's range" in reasons(found)
    assert "set to run in float16" in reasons(found) and "--dtype bfloat16" in found["next"]
    assert "--dtype float32" in said(capsys, 0, folder, "--device", "v100")["next"]


def test_a_device_without_bfloat16(released: Any, capsys: Any):
    folder = released("cogvideox-5b", "diffusers")
    found = said(capsys, 0, folder, "--device", "t4")
    assert found["verdict"] == "risky" and "t4 has no bfloat16" in reasons(found)
    assert "--dtype float32 --offload model" in found["next"]
    assert said(capsys, 0, folder, "--device", "h200")["verdict"] == "good"
    assert main(["doctor", str(folder), "--device", "t5"]) == 2


def test_shards(released: Any, capsys: Any):
    """One that is absent, one too many, and shards without their index."""
    folder = released("cogvideox-5b", "diffusers")
    part = folder / "transformer"
    shards = sorted(part.glob("*.safetensors"))
    assert len(shards) == 3
    os.link(shards[0], part / "diffusion_pytorch_model-00009-of-00009.safetensors")
    found = said(capsys, 0, folder)
    assert found["verdict"] == "good" and "does not name" in reasons(found)
    shards[1].unlink()
    found = said(capsys, 3, folder)
    assert "1 of 3 shards are absent" in reasons(found) and found["model"] == "cogvideox-5b"
    fetch = (
        f"hf download THUDM/CogVideoX-5b transformer/{shards[1].name} --local-dir {folder} --force-download"
    )
    assert found["next"] == fetch
    (part / "diffusion_pytorch_model.safetensors.index.json").unlink()
    found = said(capsys, 3, folder)
    assert f"index.json, {shards[1].name}" in reasons(found) and " && hf download" in found["next"]


def test_parts_of_others(released: Any, root: Path, capsys: Any):
    folder = released("cogvideox-5b", "diffusers")
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    vae.unlink()
    shutil.copy(root / "cogvideo_ar" / "demo" / "vqvae.safetensors", vae)
    found = said(capsys, 3, folder)
    assert "this is a part of CogVideo, not of CogVideoX" in reasons(found)
    assert "--include 'vae/*'" in found["next"]
    shutil.copy(DEMOS["demo"] / "transformer.safetensors", vae)
    assert "this is the transformer of cogvideox-demo" in reasons(said(capsys, 3, folder))
    shutil.copy(DEMOS["demo"] / "vae.safetensors", vae)
    assert "this is the vae of cogvideox-demo" in reasons(said(capsys, 3, folder))
    (folder / "tokenizer" / "spiece.model").unlink()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"\0" * 9)
    assert "not a T5 tokenizer" in reasons(said(capsys, 3, folder))


def test_settings_of_another_release(released: Any, capsys: Any):
    file = released("cogvideox-5b", "diffusers") / "vae" / "config.json"
    config = json.loads(file.read_text()) | {"scaling_factor": 1.15258426}
    file.unlink()
    file.write_text(json.dumps(config))
    found = said(capsys, 0, file.parents[1])
    assert "vae.scaling_factor is 1.15258426, cogvideox-5b was trained with 0.7" in reasons(found)


def test_an_absent_part_and_an_open_download(released: Any, capsys: Any):
    folder = released("cogvideox-5b", "diffusers")
    for file in (folder / "text_encoder").glob("model*"):
        file.unlink()
    found = said(capsys, 3, folder)
    assert "no weight file" in reasons(found) and "--include 'text_encoder/*'" in found["next"]
    (folder / "x.safetensors.incomplete").write_bytes(b"1")
    assert "did not end" in reasons(said(capsys, 3, folder))


@pytest.mark.parametrize("layout", ["ours", "diffusers", "sat"])
def test_a_model_of_its_own_sizes(tmp_path: Path, layout: Any, capsys: Any):
    """Whole, and each of its parts alone: no released model has these sizes, but its folder."""
    folder = tmp_path / "model"
    make("2b", write_tokenizer(tmp_path)).save_pretrained(folder, format=layout)
    assert said(capsys, 0, folder)["model"] == "of its own sizes"
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt")]
    assert len(files) == 3
    for file in files:
        found = said(capsys, 0, file)
        assert found["model"].startswith("of its own sizes, ")
        assert found["next"] == f"cogvideox doctor {folder}"


# ---- sums


def test_sums(tmp_path: Path, capsys: Any):
    model = Path(shutil.copytree(DEMOS["demo"], tmp_path / "model"))
    found = said(capsys, 0, model, "--hash")
    assert len(found["sha256"]) == 5 and not found["findings"]
    file = model / "vae.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert said(capsys, 0, model)["verdict"] == "good"  # headers alone cannot show it
    found = said(capsys, 3, model, "--hash")
    assert "SHA256SUMS says" in reasons(found) and str(file) in found["next"]
    (model / "SHA256SUMS").unlink()
    file.with_name(file.name + ".sha256").write_text("0" * 64 + "  vae.safetensors")
    assert "vae.safetensors.sha256 says" in reasons(said(capsys, 3, model, "--hash"))
    assert "of 4 of 5 files no sum is known" in reasons(said(capsys, 3, model, "--hash"))


def test_sums_of_the_hub(tmp_path: Path, capsys: Any):
    """A cache whose blob is named by another sum, and a folder with the hub's own notes."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(DEMOS["demo"], snapshot, ignore=shutil.ignore_patterns("SHA256SUMS"))
    blobs.mkdir()
    (snapshot / "vae.safetensors").rename(blobs / ("0" * 64))
    (snapshot / "vae.safetensors").symlink_to(blobs / ("0" * 64))
    found = said(capsys, 3, snapshot, "--hash")
    assert "the hub says" in reasons(found)
    assert found["next"] == "hf download a/b vae.safetensors --force-download"
    notes = snapshot / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "transformer.safetensors.metadata").write_text(f"c0ffee\n{'1' * 64}\n1.5\n")
    assert reasons(said(capsys, 3, snapshot, "--hash")).count("the hub says") == 2


@pytest.mark.parametrize("name", list(DEMOS))
def test_the_demo_is_what_was_published(name: str, capsys: Any):
    """If not: `sha256sum FILES > SHA256SUMS` in the demo's folder renews the list."""
    found = said(capsys, 0, name, "--hash")
    assert found["verdict"] == "good" and not found["findings"] and f"--model_path {name} " in found["next"]


# ---- adapters and differences


def pairs(width: int, name: str = "transformer_blocks.0.attn1.to_q") -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(width, 2)}


def test_an_adapter_and_its_base(tmp_path: Path, released: Any, capsys: Any):
    file, folder = tmp_path / "a.safetensors", released("cogvideox-5b", "diffusers")
    save_file(pairs(3072), file)
    found = said(capsys, 0, file)
    assert found["model"].startswith("cogvideox-5b, ") and "lora inspect" in found["next"]
    found = said(capsys, 0, file, "--base", folder)
    assert f"--lora_path {file}" in found["next"] and str(folder) in found["next"]
    save_file(pairs(1920), file)
    assert "[1920, 1920] instead of [3072, 3072]" in reasons(said(capsys, 3, file, "--base", folder))
    assert said(capsys, 0, file)["model"] == "cogvideox-2b"
    save_file(pairs(77), file)
    assert "fits no released model" in reasons(said(capsys, 3, file))


def test_adapters_that_do_nothing_or_harm(tmp_path: Path, capsys: Any):
    file, width = tmp_path / "a.safetensors", PRESETS["cogvideox-demo"]().transformer.hidden_dim
    save_file(pairs(width) | pairs(width, "transformer_blocks.99.attn1.to_q") | pairs(width, "other.q"), file)
    found = said(capsys, 0, file, "--base", "demo")
    assert found["verdict"] == "risky" and "2 of 3 adapted layers are not in demo" in reasons(found)
    assert said(capsys, 0, file)["next"].startswith("cogvideox generate --model_path demo --lora_path")
    save_file({name: x * ("lora_A" in name) for name, x in pairs(width).items()}, file)
    assert "changes nothing" in reasons(said(capsys, 0, file))
    save_file({name: x * float("nan") for name, x in pairs(width).items()}, file)
    assert "NaN" in reasons(said(capsys, 3, file))


def test_a_difference_from_another_base(tmp_path: Path, capsys: Any):
    shutil.copytree(DEMOS["demo"], tmp_path / "model")
    folder = tmp_path / "model" / "image_to_video"
    assert said(capsys, 0, folder)["verdict"] == "good"
    assert said(capsys, 0, folder / DELTA)["next"] == f"cogvideox doctor {folder}"
    for changed in (
        {"no.weight": torch.zeros(2)},
        {"text_proj.weight.lora_A": torch.zeros(2, 3), "text_proj.weight.lora_B": torch.zeros(5, 2)},
        {"text_proj.weight.lora_A": torch.zeros(2, 3)},
        {"text_proj.weight.lora_B": torch.zeros(2, 3)},
    ):
        save_file(changed, folder / DELTA)
        assert said(capsys, 3, folder)["verdict"] == "bad"
    shutil.copy(DEMOS["demo-i2v"] / DELTA, folder / DELTA)
    (tmp_path / "model" / "vae.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    found = said(capsys, 3, folder)
    assert "Git LFS pointer" in reasons(found) and "lfs pull" in found["next"]


# ---- hostile folders


@pytest.mark.parametrize("name", ["config.json", "model_index.json", "adapter_config.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "\xff\xfe", '{"family": {"a": ', "[]", "7", "null", ""])
def test_texts_that_are_no_settings(tmp_path: Path, name: str, text: str, capsys: Any):
    model = Path(shutil.copytree(DEMOS["demo"], tmp_path / "model"))
    (model / name).write_text(text, encoding="latin-1")
    code = 0 if name == "adapter_config.json" else 3
    assert said(capsys, code, model)["exit_code"] == code


def test_links_that_lead_nowhere(tmp_path: Path, capsys: Any):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    assert "there is no" in reasons(said(capsys, 3, tmp_path / "a"))
    model = Path(shutil.copytree(DEMOS["demo"], tmp_path / "model"))
    (model / "loop").symlink_to(model)
    (model / "vae.safetensors").unlink()
    (model / "vae.safetensors").symlink_to(model / "vae.safetensors")
    assert said(capsys, 3, model)["verdict"] == "bad"
