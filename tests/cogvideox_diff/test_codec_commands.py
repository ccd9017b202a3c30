"""The verbs encode, decode, invert, extend and generate with their files, on tiny models of random weights.

What is refused is refused before weights are read: the weights of the second model cannot be read at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideox_diff.__main__ import main
from cogvideox_diff.codec import decode_video, encode_video
from cogvideox_diff.formats import check_weights, open_folder
from cogvideox_diff.latent_files import LatentFile, read_latents, write_latents
from cogvideox_diff.pipeline import CogVideoXPipeline
from shared.checkpoints import save_tensors
from shared.errors import WeightsError
from shared.video import Video
from shared.video_io import read_video
from tests.cogvideox_diff.tiny_pipeline import PROMPT, clip, make, write_tokenizer

WEIGHTS = ("transformer.safetensors", "vae.safetensors", "text_encoder.safetensors")
SIDES = ("--height", 32, "--width", 48)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models by variant; "unread" has the 5b's configuration and weights that nothing can read."""
    folder = tmp_path_factory.mktemp("models")
    spiece = write_tokenizer(folder)
    names = ("5b", "1.5-5b", "5b-i2v")
    found = {name: make(name, spiece).save_pretrained(folder / name) for name in names}
    for name in ("5b", "5b-i2v"):
        found[f"unread {name}"] = Path(shutil.copytree(found[name], folder / f"unread-{name}"))
        for file in WEIGHTS:
            (found[f"unread {name}"] / file).write_bytes(b"\0" * 64)
    return found


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Nine frames, kept exactly."""
    return clip().save(tmp_path / "given.mkv")


def call(capsys: Any, *words: object) -> dict[str, Any]:
    """A verb's JSON answer; "exit_code" is what it ended with."""
    try:
        code = main([str(word) for word in (*words, "--json")])
    except SystemExit as ended:
        code = int(ended.code or 0)
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert said["exit_code"] == code, printed.err
    return said


# ---- encode and decode


def test_latents_and_back(models: dict[str, Path], given: Path, tmp_path: Path, capsys: Any) -> None:
    """The same numbers as the library's, and a file that says what they are."""
    out, film = tmp_path / "a.safetensors", tmp_path / "a.mkv"
    vae = CogVideoXPipeline.from_pretrained(models["5b"], device="cpu").parts.vae
    x = ("--model_path", models["5b"], "--device", "cpu")
    said = call(capsys, "encode", "--input_path", given, "--output_path", out, *x)
    content = read_latents(out)
    assert said["ok"] and said["shape"] == list(content.latents.shape) == [3, 4, 4, 6]
    assert torch.equal(content.latents, encode_video(vae, clip()))
    assert (content.kind, content.fps, content.num_frames, content.height) == ("clean", 8.0, 9, 32)
    assert content.scaling_factor == 0.7 and len(content.model) == 16
    said = call(capsys, "decode", "--input_path", out, "--output_path", film, *x)
    assert (said["frames"], said["height"], said["width"], said["fps"]) == (9, 32, 48, 8)
    assert torch.equal(read_video(film).frames, decode_video(vae, content.latents, 8).frames)


def test_samples_sizes_and_images(models: dict[str, Path], given: Path, tmp_path: Path, capsys: Any) -> None:
    x = ("--model_path", models["5b"], "--device", "cpu")
    shapes = {}
    sizes = {
        "mode": (),
        "sample": ("--posterior", "sample", "--seed", 3),
        "again": ("--posterior", "sample", "--seed", 3, "--tiling"),
        "small": ("--num_frames", 5, "--height", 16, "--width", 24),
        "fitted": ("--num_frames", 7, "--fit_frames", "pad"),
    }
    for name, flags in sizes.items():
        path = tmp_path / f"{name}.safetensors"
        call(capsys, "encode", "--input_path", given, "--output_path", path, *x, *flags)
        shapes[name] = read_latents(path).latents
    assert not torch.equal(shapes["mode"], shapes["sample"])
    assert torch.equal(shapes["again"], shapes["sample"])  # a frame is smaller than a tile
    assert shapes["small"].shape == (2, 4, 2, 3) and shapes["fitted"].shape == (3, 4, 4, 6)
    from PIL import Image

    Image.fromarray(clip().frames[0].numpy()).save(tmp_path / "one.png")
    said = call(
        capsys,
        "encode",
        "--input_path",
        tmp_path / "one.png",
        "--output_path",
        tmp_path / "i.safetensors",
        *x,
    )
    assert said["shape"] == [1, 4, 4, 6]


def test_codec_refusals_come_before_the_weights(
    models: dict[str, Path], given: Path, tmp_path: Path, capsys: Any
) -> None:
    x = ("--model_path", models["unread 5b"], "--device", "cpu")
    there = tmp_path / "there.safetensors"
    other = {"scale": {"scaling_factor": 1.15}, "kind": {"kind": "noise"}, "size": {"height": 64}}
    plain = {"kind": "clean", "scaling_factor": 0.7, "fps": 8.0, "num_frames": 9, "height": 32, "width": 48}
    for name, change in other.items():
        content = LatentFile(latents=torch.zeros(3, 4, 4, 6), model="", **(plain | change))  # type: ignore[arg-type]
        write_latents(tmp_path / f"{name}.safetensors", content)
    wide = LatentFile(latents=torch.zeros(3, 16, 4, 6), model="", **plain)  # type: ignore[arg-type]
    write_latents(tmp_path / "wide.safetensors", wide)
    save_tensors({"latents": torch.zeros(2)}, there)
    to = ("--output_path", tmp_path / "new.safetensors")
    film = ("--output_path", tmp_path / "new.mkv")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("encode", "--input_path", given, *to, "--num_frames", 7), "4k+1, got 7; nearest: 9"),
        (("encode", "--input_path", given, *to, "--num_frames", 13), "exceeds the given video's 9"),
        (("encode", "--input_path", given, *to, "--height", 30), "multiple of 8, got 30; nearest: 32"),
        (("encode", "--input_path", given, *to, "--dtype", "float8"), "unknown dtype"),
        (("encode", "--input_path", given, "--output_path", there), "already exists"),
        (("encode", "--input_path", given, "--output_path", tmp_path / "a.pt"), ".safetensors"),
        (("encode", "--input_path", tmp_path / "no.mp4", *to), "cannot read the video"),
        (("decode", "--input_path", tmp_path / "no.safetensors", *film), "no file of latents"),
        (("decode", "--input_path", there, *film), "has no latents"),
        (("decode", "--input_path", tmp_path / "kind.safetensors", *film), "noise, not clean"),
        (("decode", "--input_path", tmp_path / "scale.safetensors", *film), "scaled by 1.15"),
        (("decode", "--input_path", tmp_path / "size.safetensors", *film), "the file says 64x48"),
        (("decode", "--input_path", tmp_path / "wide.safetensors", *film), "16 channels"),
        (("decode", "--input_path", there, "--output_path", tmp_path / "a.avi"), ".mp4, .mkv, .gif"),
    ]
    check(capsys, [((*words, *x), reason) for words, reason in cases])
    assert not (tmp_path / "new.safetensors").exists()
    said = call(capsys, "encode", "--input_path", given, *to, *x)
    assert said["exit_code"] == 3, "only now the weights are read"


def test_of_a_long_film_only_the_beginning_is_decoded(
    models: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counted(*words: Any, **flags: Any) -> Video:
        video = read_video(*words, **flags)
        read.append(video.num_frames)
        return video

    monkeypatch.setattr("shared.video_io.read_video", counted)
    film = clip(60, 16, 16).save(tmp_path / "film.mkv")
    most = open_folder(models["5b"]).config.geometry.max_frames
    x = ("--model_path", models["unread 5b"], "--device", "cpu")
    out = ("--output_path", tmp_path / "new.safetensors")
    video = ("generate", "--prompt", PROMPT, "--output_path", tmp_path / "new.mp4", "--image_or_video_path")
    for words, frames, code in (
        ((*video, film, "--num_frames", 9), most + 1, 3),
        ((*video, film, "--fit_frames", "nearest"), most + 1, 3),
        (("invert", "--input_path", film, *out, "--fit_frames", "trim"), most + 1, 3),
        (("invert", "--input_path", film, *out), most + 1, 2),
        (("encode", "--input_path", film, *out, "--num_frames", 7, "--fit_frames", "pad"), 11, 3),
        (("encode", "--input_path", film, *out), 60, 2),  # all are asked for
    ):
        assert call(capsys, *words, *x)["exit_code"] == code, words
        assert read.pop() == frames < 61


def check(capsys: Any, cases: list[tuple[tuple[object, ...], str]], code: int = 2) -> None:
    for words, reason in cases:
        said = call(capsys, *words)
        assert said["exit_code"] == code and reason in said["reason"], (words, said)


# ---- invert, and generate from what it found


def test_invert_and_go_on(models: dict[str, Path], given: Path, tmp_path: Path, capsys: Any) -> None:
    x = ("--model_path", models["5b"], "--device", "cpu")
    noise = tmp_path / "noise.safetensors"
    flags = ("--num_inference_steps", 3, "--iterations", 60, "--reconstruct", "--edit_prompt", "noise")
    said = call(
        capsys, "invert", "--input_path", given, "--prompt", PROMPT, "--output_path", noise, *x, *flags
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert {"noise.safetensors", "noise-reconstruction.mp4", "noise-edit.mp4"} <= names
    assert said["psnr"] <= 100 and said["latent_error"] >= 0 and said["psnr_of_the_vae"] > 0
    film = tmp_path / "b.mkv"
    again = call(capsys, "generate", "--prompt", PROMPT, "--latents_path", noise, "--output_path", film, *x)
    settings = again["settings"]
    assert (settings["scheduler"], settings["num_inference_steps"], settings["guidance_scale"]) == (
        "ddim",
        3,
        1,
    )
    assert read_video(film).num_frames == 9
    told = json.loads(film.with_suffix(".json").read_text())["inputs"]
    assert told["latents_path"] == str(noise) and len(told["latents_sha256"]) == 16


def test_noise_refusals_come_before_the_weights(
    models: dict[str, Path], given: Path, tmp_path: Path, capsys: Any
) -> None:
    x = ("--model_path", models["unread 5b"], "--device", "cpu")
    plain = {"scaling_factor": 0.7, "fps": 8.0, "num_frames": 9, "height": 32, "width": 48, "model": ""}
    for kind in ("noise", "clean"):
        latents = LatentFile(latents=torch.zeros(3, 4, 4, 6), kind=kind, **plain)  # type: ignore[arg-type]
        write_latents(tmp_path / f"{kind}.safetensors", latents)
    noise = ("--latents_path", tmp_path / "noise.safetensors")
    y = ("generate", "--prompt", PROMPT, "--output_path", tmp_path / "new.mp4", *x)
    inverted = ("invert", "--input_path", given, "--output_path", tmp_path / "n.safetensors", *x)
    cases: list[tuple[tuple[object, ...], str]] = [
        ((*y, *noise, "--scheduler", "dpm"), "needs the ddim scheduler, got dpm"),
        ((*y, *noise, "--num_frames", 17), "these settings need [5, 4, 4, 6]"),
        ((*y, *noise, "--image_or_video_path", given), "takes no video"),
        ((*y, "--latents_path", tmp_path / "clean.safetensors"), "clean, not noise"),
        ((*inverted, "--num_inference_steps", 1), "at least 2, got 1"),
        ((*inverted, "--iterations", 0), "iterations must be at least 1"),
        ((*inverted, "--height", 40), "nearest: 48"),
        ((*inverted, "--num_frames", 4), "got 4; nearest: 1"),
    ]
    check(capsys, cases)
    assert call(capsys, *inverted)["exit_code"] == 3


# ---- extend


def test_extend_writes_one_video_and_its_drift(models: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "long.mkv"
    flags = ("--model_path", models["5b"], "--device", "cpu", "--num_inference_steps", 2)
    flags += ("--num_clips", 3, "--next_prompt", "noise", "--next_prompt", PROMPT)
    said = call(capsys, "extend", "--prompt", PROMPT, "--output_path", path, *flags)
    assert said["settings"]["chain"]["overlap"] == 5
    assert "not in the release" in said["settings"]["chain"]["note"]
    told = json.loads(path.with_suffix(".json").read_text())
    assert read_video(path).num_frames == told["frames"] == 17
    assert [clip["clip"] for clip in told["measured"]["drift"]] == [0, 1, 2]
    assert told["measured"]["drift"][0]["sharpness"] == 1.0


def test_extend_continues_a_video(models: dict[str, Path], given: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "long.mkv"
    flags = ("--model_path", models["5b-i2v"], "--device", "cpu", "--num_inference_steps", 2)
    call(
        capsys,
        *("extend", "--prompt", PROMPT, "--output_path", path, *flags, "--num_clips", 1),
        *("--image_or_video_path", given),
    )
    assert read_video(path).num_frames == 9 + 8


def test_extend_refusals_come_before_the_weights(
    models: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    x = ("extend", "--prompt", PROMPT, "--output_path", tmp_path / "new.mp4", "--device", "cpu")
    x += ("--model_path", models["unread 5b"])
    cases: list[tuple[tuple[object, ...], str]] = [
        ((*x, "--num_clips", 0), "num_clips must be at least 1"),
        ((*x, "--overlap", 6), "up to 5, got 6; nearest: 5"),
        ((*x, "--num_clips", 3, "--next_prompt", "a"), "legal: 2, or none"),
        ((*x, "--latents_path", tmp_path / "a.safetensors"), "takes no video and no chain"),
    ]
    check(capsys, cases)
    assert call(capsys, *x)["exit_code"] == 3


# ---- generate: all is checked before the weights


def test_generate_refusals_come_before_the_weights(
    models: dict[str, Path], given: Path, tmp_path: Path, capsys: Any
) -> None:
    out = ("--prompt", PROMPT, "--output_path", tmp_path / "new.mp4", "--device", "cpu")
    text = ("generate", "--model_path", models["unread 5b"], *out)
    image = ("generate", "--model_path", models["unread 5b-i2v"], *out)
    save_tensors({"lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    layer = "transformer.transformer_blocks.0.attn1.to_q.lora_"
    other_rank = {f"{layer}A.weight": torch.zeros(4, 32), f"{layer}B.weight": torch.zeros(32, 8)}
    save_tensors(other_rank, tmp_path / "rank.safetensors")
    short = clip(11).save(tmp_path / "short.mkv")
    cases: list[tuple[tuple[object, ...], str, int]] = [
        ((*text, "--num_frames", 10), "got 10; nearest: 9", 2),
        ((*text, "--height", 40), "got 40; nearest: 48", 2),
        ((*text, "--dtype", "float12"), "unknown dtype", 2),
        ((*text, "--generate_type", "i2v"), "needs --image_or_video_path", 2),
        ((*text, "--image_or_video_path", short), "got 11; nearest: 9", 2),
        ((*text, "--lora_path", tmp_path / "lora.safetensors"), "", 3),
        ((*text, "--lora_path", tmp_path / "rank.safetensors"), "A [4, 32] and B [32, 8]", 3),
        (image, "needs an image, got no image", 2),
        ((*image, "--image_or_video_path", given), "needs an image, got a video", 2),
    ]
    for words, reason, code in cases:
        check(capsys, [(words, reason)], code)
        assert "unread" not in call(capsys, *words)["reason"], "it is not about the weights"
    assert "unread" in call(capsys, *text)["reason"]
    fitted = call(capsys, *text, "--image_or_video_path", short, "--fit_frames", "pad", "--dry_run")
    assert "unread" in fitted["reason"], "legal now; even a dry run looks at the headers"


def test_weights_of_another_model_are_refused_by_their_headers(
    models: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    """The last part is of another size: nothing of the others is read; float16 for bfloat16 is refused."""
    folder = Path(shutil.copytree(models["5b"], tmp_path / "model"))
    shutil.copyfile(models["1.5-5b"] / WEIGHTS[0], folder / WEIGHTS[0])
    x = ("generate", "--prompt", PROMPT, "--output_path", tmp_path / "new.mp4", "--device", "cpu")
    said = call(capsys, *x, "--model_path", folder, "--dry_run")
    assert said["exit_code"] == 3 and "ExpertTransformer" in said["reason"]
    shutil.rmtree(folder / "tokenizer")
    shutil.copyfile(models["5b"] / WEIGHTS[0], folder / WEIGHTS[0])
    assert "lacks its tokenizer" in call(capsys, *x, "--model_path", folder)["reason"]
    assert open_folder(folder).trained_dtype == torch.float32
    header = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(header | {"dtype": "bfloat16"}))
    said = call(capsys, *x, "--model_path", folder, "--dtype", "float16")
    assert said["exit_code"] == 2 and "legal: bfloat16 (nearest)" in said["reason"]


def test_headers_of_a_difference_are_checked_too(models: dict[str, Path], tmp_path: Path) -> None:
    """A folder that stores what differs from another one: its file names a shape that does not fit."""
    base = Path(shutil.copytree(models["5b"], tmp_path / "base"))
    (folder := tmp_path / "other").mkdir()
    header = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(header | {"base": "../base"}))
    pair = {"proj_out.weight.lora_A": torch.ones(1, 32), "proj_out.weight.lora_B": torch.ones(16, 1)}
    save_tensors(pair, folder / "transformer_delta.safetensors")
    check_weights(open_folder(folder))
    save_tensors({"proj_out.weight": torch.ones(4, 4)}, folder / "transformer_delta.safetensors")
    with pytest.raises(WeightsError, match=r"proj_out.weight \[4, 4\] instead of \[16, 32\]"):
        check_weights(open_folder(folder))


def test_generate_fits_frames_and_pads_in_either_place(
    models: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    short = Video(frames=clip(11).frames, fps=4).save(tmp_path / "short.mkv")
    x = ("generate", "--prompt", PROMPT, "--device", "cpu", "--num_inference_steps", 2, *SIDES)
    x += ("--model_path", models["1.5-5b"], "--image_or_video_path", short, "--strength", 1)
    for padding, how, frames in (("front", "pad", 17), ("back", "trim", 9), ("back", "nearest", 9)):
        path = tmp_path / f"{padding}-{how}.mkv"
        flags = ("--fit_frames", how, "--frame_padding", padding)
        said = call(capsys, *x, "--output_path", path, *flags)
        assert said["settings"]["frame_padding"] == padding
        video = read_video(path)
        assert (video.num_frames, video.fps) == (frames, 4)
