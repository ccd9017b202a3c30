"""The verb `doctor` of CogVideoX on whole, damaged and foreign files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvideox_diff.__main__ import main
from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER
from cogvideox_diff.config import PRESETS
from cogvideox_diff.doctor import _nearest, _type_risks
from cogvideox_diff.formats import DEMOS
from cogvideox_diff.model_files import empty_net
from shared.checkpoints import invert


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMOS["demo"], tmp_path / "model"))


def said(path: Path, capsys: pytest.CaptureFixture[str], code: int) -> dict:
    assert main(["doctor", str(path), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_good(model: Path, capsys: pytest.CaptureFixture[str]):
    found = said(model, capsys, 0)
    assert (found["verdict"], found["layout"], found["model"]) == ("good", "ours", "cogvideox-demo")
    assert found["next"].startswith("cogvideox generate --model_path")


def test_damaged_files_are_named_with_what_to_do(model: Path, capsys: pytest.CaptureFixture[str]):
    file = model / "vae.safetensors"
    whole = file.read_bytes()
    for data, reason in (
        (whole[:-5], "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"", "empty"),
    ):
        file.write_bytes(data)
        found = said(model, capsys, 3)
        assert reason in found["findings"][0]["reason"] and str(model) in found["next"]


def test_absent_and_swapped_parts(model: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copy(model / "vae.safetensors", model / "transformer.safetensors")
    assert "do not fit" in said(model, capsys, 3)["findings"][0]["reason"]
    (model / "transformer.safetensors").unlink()
    assert said(model, capsys, 3)["verdict"] == "bad"


def test_the_other_family_is_sent_to_its_doctor(root: Path, capsys: pytest.CaptureFixture[str]):
    assert said(root / "cogvideo_ar" / "demo", capsys, 3)["next"].startswith("cogvideo-ar doctor")


def test_a_link_out_of_the_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "vae.safetensors").write_bytes((model / "vae.safetensors").read_bytes())
    (model / "vae.safetensors").unlink()
    (model / "vae.safetensors").symlink_to(tmp_path / "vae.safetensors")
    assert "leaves the folder" in said(model, capsys, 3)["findings"][0]["reason"]


def released(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    ours = empty_net("transformer", PRESETS[name]()).state_dict()
    return {n: torch.empty(x.shape, dtype=dtype, device="meta") for n, x in ours.items()}


def test_released_models_are_told_apart_and_float16_is_a_risk():
    tensors = released("cogvideox-5b", torch.float16)
    theirs = invert(tensors, DIFFUSERS_TRANSFORMER)
    assert _nearest("transformer", "diffusers", theirs) == ("cogvideox-5b", "")
    theirs.pop("proj_out.bias")
    name, reason = _nearest("transformer", "diffusers", theirs)
    assert name == "cogvideox-5b" and "1 missing" in reason
    assert [f.level for f in _type_risks("transformer", tensors, "cogvideox-5b")] == ["risk"]
    assert not list(_type_risks("transformer", tensors, "cogvideox-2b"))
