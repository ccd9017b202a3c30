"""Weights that are damaged, hold NaN, or are too large for the type that they run in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.reliability.families import Family, sidecar

CASES = [("cogvideo", net) for net in ("keyframes", "interpolation", "vqvae")]
CASES += [("cogvideox", net) for net in ("text_encoder", "transformer", "vae")]
MATRICES = {  # of each net one that every video goes through
    "keyframes": "blocks.1.mlp.up.weight",
    "interpolation": "blocks.1.attention.temporal.qkv.weight",
    "vqvae": "decoders.8.conv_out.weight",
    "text_encoder": "t5.encoder.block.0.layer.0.SelfAttention.q.weight",
    "transformer": "blocks.1.mlp.fc1.weight",
    "vae": "decoder.conv_out.conv.weight",
}
HOMES = {  # where the first number that is not finite appears
    "interpolation": "interpolation.blocks.1.attention.temporal.qkv",
    "text_encoder": "text_encoder.t5.encoder.block.0.layer.0.SelfAttention.q",
    "transformer": "blocks.1.mlp.fc1",
    "vae": "vae.decoder",  # its quick paths call no layer by itself
}


@pytest.mark.parametrize(
    ("name", "net", "value"),
    [*((*case, float("nan")) for case in CASES), *((*case, float("inf")) for case in CASES[::3])],
)
def test_one_bad_number_ends_with_5_and_names_its_module(
    name: str,
    net: str,
    value: float,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    family: Family = request.getfixturevalue(name)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[MATRICES[net]].flatten()[0] = value

    model = family.damaged(tmp_path / "model", net, spoil)
    assert family.generate(tmp_path / "out" / "a.mp4", model=model) == 5
    said = capsys.readouterr().err
    home = HOMES.get(net, f"{net}.{MATRICES[net].removesuffix('.weight')}")
    assert home in said and said.count("\n") == 1 and "NaN" in said
    assert not (tmp_path / "out").exists()


def test_overflow_in_half_precision_is_told_and_says_what_helps(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers that float32 holds well: there the same weights end with 0."""
    net = "keyframes" if family.package == "cogvideo_ar" else "transformer"
    names = ("blocks.0.mlp.up", "blocks.0.mlp.down") if net == "keyframes" else ("blocks.0.mlp.fc1",) * 2

    def enlarge(tensors: dict[str, Tensor]) -> None:
        for name in names:
            tensors[f"{name}.weight"] *= 3000

    model = family.damaged(tmp_path / "model", net, enlarge)
    half = family.generate(tmp_path / "half" / "a.mp4", "--dtype", "float16", model=model)
    said = capsys.readouterr().err
    assert half == 5 and "blocks.0" in said and said.count("\n") == 1
    assert not (tmp_path / "half").exists()
    assert family.generate(tmp_path / "a.mp4", "--dtype", "float32", model=model) in (0, 5)
    assert "NaN" not in capsys.readouterr().err


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


@pytest.mark.parametrize("damage", [cut, empty, pointer, Path.unlink])
def test_a_damaged_file_is_named_before_anything_is_made(
    family: Family, damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(family.model, model := tmp_path / "model")
    damage(path := model / f"{family.nets[-1]}.safetensors")
    assert family.generate(tmp_path / "out" / "a.mp4", model=model) == 3
    said = capsys.readouterr().err
    assert path.name in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_is_named(cogvideox: Family, tmp_path: Path, capsys) -> None:
    model = tmp_path / "sharded"
    assert cogvideox.main(
        "convert", "--model_path", cogvideox.model, "--output_path", model, "--to", "diffusers",
        "--shard_gb", "0.00005",
    ) == 0  # fmt: skip
    shards = sorted((model / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    cut(shards[1])
    capsys.readouterr()
    assert cogvideox.generate(tmp_path / "out" / "a.mp4", model=model) == 3
    said = capsys.readouterr().err
    assert shards[1].name in said and said.count("\n") == 1


# ---- a video that shows nothing


LOOKS = {"black": (0.0, -9.0), "white": (0.0, 9.0), "one flat colour": (0.0, 0.0), "saturated": (1e6, 0.0)}


@pytest.mark.parametrize(
    ("name", "look"),
    [*(("cogvideox", look) for look in LOOKS), ("cogvideo", "black"), ("cogvideo", "saturated")],
)
def test_a_video_that_shows_nothing_is_flagged(
    name: str, look: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    family: Family = request.getfixturevalue(name)
    net, _, layer = family.last.partition(".")
    weight, bias = LOOKS[look]

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{layer}.weight"] *= weight
        tensors[f"{layer}.bias"].fill_(bias)

    model = family.damaged(tmp_path / "model", net, spoil)
    path = tmp_path / "a.mkv"
    assert family.generate(path, model=model) == 5
    assert look in capsys.readouterr().err and path.is_file()
    check = sidecar(path)["check"]
    assert check["status"] == "failed" and look in check["failures"][0]


def test_a_frozen_video_is_a_warning_in_the_sidecar(cogvideox: Family, tmp_path: Path) -> None:
    """One frame shown again and again: of a prompt it may be what was asked for, so the exit code is 0."""
    from shared.self_check import check_video
    from shared.video import Video

    frames = torch.randint(256, (1, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    verdict = check_video(Video(frames=frames.repeat(5, 1, 1, 1), fps=8))
    assert verdict.status == "warning" and verdict.warnings == ("frozen: all frames are the same",)


# ---- training


def test_a_loss_that_is_not_finite_ends_with_5_and_keeps_the_state(
    cogvideox: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.shared.clip_files import world

    clips = world(tmp_path / "clips", 2)
    words = ("finetune", "--data", clips, "--output_path", tmp_path / "out", "--device", "cpu", "--quiet",
             "--num_frames", 9, "--height", 32, "--width", 48, "--save_every", 1, "--rank", 2)  # fmt: skip
    assert cogvideox.main(*words, "--model_path", cogvideox.model, "--steps", 1) == 0
    state = (tmp_path / "out" / "run" / "state.pt").read_bytes()
    capsys.readouterr()
    assert cogvideox.main(*words, "--model_path", cogvideox.model, "--steps", 3, "--lr", 1e30) in (2, 5)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ")
    assert (tmp_path / "out" / "run" / "state.pt").read_bytes() == state
    model = cogvideox.damaged(
        tmp_path / "model", "transformer", lambda t: t["blocks.0.mlp.fc1.weight"].fill_(float("nan"))
    )
    words = tuple(tmp_path / "new" if word == tmp_path / "out" else word for word in words)
    assert cogvideox.main(*words, "--model_path", model, "--steps", 2) == 5
    said = capsys.readouterr().err
    assert "the loss is nan at step 0" in said and said.count("\n") == 1
    assert not (tmp_path / "new" / "run" / "state.pt").exists()
