"""The verb `doctor` of CogVideo on whole, damaged and foreign files, of the released sizes too (files with
holes); every next step that it proposes is one that the program takes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cogvideo_ar.__main__ import main
from cogvideo_ar.checkpoints import ICETK_VQVAE, SAT_DSR, SAT_ITERSR, SAT_STAGE
from cogvideo_ar.config import cogvideo, cogview2_dsr, cogview2_itersr
from cogvideo_ar.parts import DEMO
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideo_ar.vqvae import VQVAE
from shared.checkpoints import Table, invert, load_tensors
from shared.model_folder import without_memory
from tests.cogvideo_ar.released_parts import write_released
from tests.shared.sparse_files import check_command, write_safetensors, write_sat, write_torch

DIFFUSION = Path(__file__).parents[2] / "cogvideox_diff" / "demo"


def said(path: str | Path, capsys: pytest.CaptureFixture[str], code: int, *words: str | Path) -> dict:
    assert main(["doctor", str(path), *map(str, words), "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    for step in (found["next"], found["use"], *(finding["next"] for finding in found["findings"])):
        assert not step or check_command(step)
    return found


def reasons(found: dict) -> str:
    return " | ".join(f"{x['level']}: {x['reason']}" for x in found["findings"])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


# ---- our own folders


def test_good_damaged_and_foreign(model: Path, capsys: Any):
    assert said(model, capsys, 0)["verdict"] == "good"
    shutil.copy(model / "vqvae.safetensors", model / "keyframes.safetensors")
    found = said(model, capsys, 3)
    assert "keyframes: this is the codec of CogVideo; weights do not fit" in reasons(found)
    shutil.copy(DIFFUSION / "vae.safetensors", model / "keyframes.safetensors")
    assert "keyframes: this is a part of CogVideoX" in reasons(said(model, capsys, 3))
    (model / "keyframes.safetensors").write_bytes(b"\0" * 64)
    assert "truncated" in said(model, capsys, 3)["findings"][0]["reason"]
    (model / "keyframes.safetensors").unlink()
    assert "lacks keyframes.safetensors" in reasons(said(model, capsys, 3))
    assert said(DIFFUSION, capsys, 3)["next"].startswith("cogvideox doctor")
    assert said(DIFFUSION / "vae.safetensors", capsys, 3)["next"].startswith("cogvideox doctor")


def test_the_demo_is_what_was_published(capsys: Any):
    """If not: `sha256sum FILES > SHA256SUMS` in the demo's folder renews the list."""
    found = said("demo", capsys, 0, "--hash")
    assert found["verdict"] == "good" and not found["findings"] and len(found["sha256"]) == 4
    assert "--model_path demo " in found["next"] and found["model"] == "cogvideo-demo"


def test_text_models(model: Path, capsys: Any):
    file = model / "ice_text.model"
    found = said(file, capsys, 0)
    assert found["model"].startswith("text model alone") and found["next"] == f"cogvideo-ar doctor {model}"
    shutil.copy(DIFFUSION / "tokenizer" / "spiece.model", file)
    assert "the text model gives" in reasons(said(model, capsys, 3))
    for data, reason in (
        (file.read_bytes()[:999], "model"),
        (b"version https://git-lfs\n", "LFS"),
        (b"", ""),
    ):
        file.write_bytes(data)
        assert reason in reasons(said(file, capsys, 3))
        assert said(model, capsys, 3)["verdict"] == "bad"


@pytest.mark.parametrize("name", ["keyframes", "interpolation", "vqvae"])
def test_parts_of_our_own(model: Path, tmp_path: Path, name: str, capsys: Any):
    found = said(model / f"{name}.safetensors", capsys, 0)
    assert found["layout"] == "ours" and found["next"] == f"cogvideo-ar doctor {model}"
    lone = Path(shutil.copy(model / f"{name}.safetensors", tmp_path / f"{name}.safetensors"))
    found = said(lone, capsys, 0)
    assert found["next"].startswith("cogvideo-ar doctor demo --") and str(lone) in found["next"]
    words = found["next"].split()[3:]
    assert said("demo", capsys, 0, *words)["verdict"] == "good"


def test_types(model: Path, capsys: Any):
    file = model / "keyframes.safetensors"
    tensors = load_tensors(file, device="meta")
    for kind, verdict in ((torch.bfloat16, "risky"), (torch.float8_e4m3fn, "risky"), (torch.float32, "good")):
        write_safetensors({name: x.to(kind) for name, x in tensors.items()}, file)
        assert said(model, capsys, 0)["verdict"] == verdict


@pytest.mark.parametrize("text", ["[" * 100_000, "\xff\xfe", '{"family": {"a": ', "[]", "7", "null", ""])
def test_texts_that_are_no_settings(model: Path, text: str, capsys: Any):
    (model / "config.json").write_text(text, encoding="latin-1")
    assert said(model, capsys, 3)["verdict"] == "bad"


# ---- released parts


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_released(tmp_path_factory.mktemp("released"))


@pytest.fixture
def released(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "released", copy_function=os.link))


def test_a_released_folder(released: Path, tmp_path: Path, capsys: Any):
    found = said(released, capsys, 0)
    assert (found["verdict"], found["layout"]) == ("good", "sat")
    assert said(released / "cogvideo-stage1", capsys, 0)["next"] == f"cogvideo-ar doctor {released}"
    assert said(released / "ice_image.pt", capsys, 0)["model"].startswith("codec alone")
    codec = (released / "ice_image.pt").rename(tmp_path / "ice_image.pt")
    found = said(released, capsys, 3)
    assert "lacks ice_image.pt" in reasons(found) and "--codec_path" in found["next"]
    assert said(released, capsys, 0, "--codec_path", codec)["next"].count(str(codec)) == 1
    assert "--codec_path takes the image codec" in reasons(
        said(released, capsys, 3, "--codec_path", released / "cogvideo-stage1")
    )


def test_stages_that_look_alike_are_asked_for(released: Path, capsys: Any):
    for stage, name in ((1, "a"), (2, "b")):
        (folder := released / f"cogvideo-stage{stage}").rename(released / name)
        (released / name / "model_config.json").unlink()
        assert not folder.exists()
    found = said(released, capsys, 3)
    assert "--stage1_path STAGE1 --stage2_path STAGE2" in found["next"]


def test_a_checkpoint_of_which_parts_are_absent(released: Path, capsys: Any):
    file = next((released / "cogvideo-stage1").rglob("mp_rank_00*"))
    os.link(file, file.with_name("mp_rank_02_model_states.pt"))
    assert "parts [0, 2]; some are absent" in reasons(said(released / "cogvideo-stage1", capsys, 3))
    (file.parents[1] / "latest").unlink()
    (file.parents[1] / "latest").write_text("../../etc")
    assert "positive iteration number" in reasons(said(released / "cogvideo-stage1", capsys, 3))


PARTS: dict[str, tuple[type[nn.Module], Any, Table]] = {
    "stage": (CogVideoTransformer, lambda: cogvideo().keyframes, SAT_STAGE),
    "direct": (SuperResolutionTransformer, cogview2_dsr, SAT_DSR),
    "iterative": (SuperResolutionTransformer, cogview2_itersr, SAT_ITERSR),
    "codec": (VQVAE, lambda: cogvideo().vqvae, ICETK_VQVAE),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_the_released_sizes(kind: str, tmp_path: Path, capsys: Any):
    make, settings, table = PARTS[kind]
    with without_memory():
        net = make(settings())
    tensors: dict[str, Tensor] = {name: x.half() for name, x in invert(net.state_dict(), table).items()}
    (folder := tmp_path / "alone").mkdir()  # not beside what other tests left: two folders up are looked at
    path = folder / ("ice_image.pt" if kind == "codec" else "part")

    def write() -> None:
        if kind == "codec":
            write_torch({"module": tensors}, path)
        else:
            write_sat(tensors, path)

    write()
    found = said(path, capsys, 0)
    assert found["model"] == f"{kind} alone, as released" and str(path) in found["next"]
    assert ("released in float32" in reasons(found)) == (kind == "codec")
    tensors.pop(next(name for name in tensors if name.endswith(".bias")))
    write()
    assert "1 missing" in reasons(said(path, capsys, 3))


def test_tables_of_clusters(tmp_path: Path, capsys: Any):
    file = tmp_path / "cluster_label2.npy"
    np.save(file, np.arange(20000) % 500)
    found = said(file, capsys, 0)
    assert found["model"] == "500 clusters of 20000 image tokens" and str(file) in found["next"]
    np.save(file, np.array([print], dtype=object), allow_pickle=True)
    assert "not an array of integers" in reasons(said(file, capsys, 3))
