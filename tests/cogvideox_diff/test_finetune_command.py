"""The verb `finetune` from clips on disk to what `generate` loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.__main__ import main
from cogvideox_diff.training import clip_latents
from shared.checkpoints import load_tensors
from shared.clips import shapes
from shared.clips.buckets import parse_buckets
from shared.errors import SettingError
from shared.video_io import write_video
from tests.cogvideox_diff.tiny_pipeline import FRAMES, HEIGHT, PROMPT, WIDTH, make, write_tokenizer

SIZE = ["--num_frames", str(FRAMES), "--height", str(HEIGHT), "--width", str(WIDTH)]
QUICK = ["--steps", "2", "--rank", "2", "--device", "cpu", "--quiet"]


def data(folder: Path, count: int = 3, *, image: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, scene in zip(range(count), shapes.scenes("train", 3), strict=False):
        video = shapes.render(scene, num_frames=12 + i)
        write_video(video, folder / f"{i}.mp4")
        lines.append({"video": f"{i}.mp4", "caption": scene.caption.text})
    if image:
        Image.fromarray(shapes.render(scene, num_frames=1).frames[0].numpy()).save(folder / "still.png")
        lines.append({"video": "still.png", "caption": scene.caption.image_text})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def model_folder(folder: Path, variant: str, layout: str = "ours") -> Path:
    pipeline = make(variant, write_tokenizer(folder / "words"))
    return pipeline.save_pretrained(folder / "model", format=layout)  # type: ignore[arg-type]


def tune(folder: Path, model: Path, *more: str) -> int:
    words = ["finetune", "--model_path", str(model), "--data", str(folder / "data"), "--output_path",
             str(folder / "out"), *QUICK, *more]  # fmt: skip
    return main(words)


@pytest.mark.parametrize("variant", ["2b", "5b", "5b-i2v", "1.5", "1.5-i2v"])
def test_every_variant_gets_an_adapter_that_loads(tmp_path: Path, variant: str) -> None:
    data(tmp_path / "data")
    model = model_folder(tmp_path, variant)
    assert tune(tmp_path, model, *SIZE, "--sample_prompts", PROMPT) == 0
    pipeline = CogVideoXPipeline.from_pretrained(model, device="cpu")
    report = pipeline.load_lora(tmp_path / "out")
    assert report.matched == 8
    assert not report.unmatched
    assert list((tmp_path / "out" / "run" / "samples").glob("*prompt-0*"))
    assert (tmp_path / "out" / "run" / "state.pt").is_file()


@pytest.mark.parametrize(("variant", "task", "layout"), [("5b", "t2v", "diffusers"), ("5b", "i2v", "ours")])
def test_all_weights_give_a_model_folder(tmp_path: Path, variant: str, task: str, layout: str) -> None:
    """Text to video in full, and image to video from a model that only read text: an adapter would not hold
    the widened patch embedding."""
    data(tmp_path / "data")
    method = "full" if task == "t2v" else "lora"
    model = model_folder(tmp_path, variant, layout)
    assert tune(tmp_path, model, *SIZE, "--task", task, "--method", method, "--lr", "0.01") == 0
    before, after = (
        CogVideoXPipeline.from_pretrained(path, device="cpu") for path in (model, tmp_path / "out" / "model")
    )
    assert after.tasks == ({"t2v", "v2v"} if task == "t2v" else {"i2v"})
    name = "blocks.0.attn.q.weight"
    assert not before.parts.transformer.get_parameter(name).equal(after.parts.transformer.get_parameter(name))


def test_clips_are_encoded_once_and_a_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data(tmp_path / "data")
    model = model_folder(tmp_path, "5b")
    assert tune(tmp_path, model, *SIZE, "--decay_fraction", "0") == 0
    first = load_tensors(tmp_path / "out" / "pytorch_lora_weights.safetensors")

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(clip_latents, "read_fitted", refuse)
    assert tune(tmp_path, model, *SIZE, "--steps", "3") == 0
    log = (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == 3
    second = load_tensors(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert any(not first[name].equal(second[name]) for name in first)
    assert tune(tmp_path, model, *SIZE, "--steps", "3", "--rank", "3") == 2  # another recipe


def test_images_and_clips_train_together_in_packs(tmp_path: Path) -> None:
    data(tmp_path / "data", image=True)
    model = model_folder(tmp_path, "1.5")
    sizes = ["--sizes", "9x32x48", "1x32x32"]
    assert tune(tmp_path, model, *sizes, "--pack_tokens", "60") == 0
    assert tune(tmp_path, model, *sizes) == 2  # different sizes make no plain batch
    assert tune(tmp_path, model, *sizes, "--pack_tokens", "20") == 2


def test_mistakes_are_told_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data(tmp_path / "data")
    model = model_folder(tmp_path, "5b")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(CogVideoXPipeline, "from_pretrained", refuse)
    for flags, said in (
        (["--num_frames", "10"], "nearest: 9"),
        (["--height", "30"], "nearest: 32"),
        (["--rank", "0"], "rank"),
        (["--targets", "attn.qq"], "attn.q"),
        (["--data", str(tmp_path / "nowhere")], "no list of clips"),
        (["--sizes", "9x32x48", "--height", "32"], "--sizes"),
        (["--text_dropout", "1"], "text_dropout"),
    ):
        assert tune(tmp_path, model, *flags) == 2
        assert said in capsys.readouterr().err
    assert tune(tmp_path, model, *SIZE, "--dry_run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 3
    assert not (tmp_path / "out").exists()


def test_a_clip_without_caption_and_an_image_model_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data(tmp_path / "data", 1)
    model = model_folder(tmp_path, "5b-i2v")
    assert tune(tmp_path, model, "--task", "t2v") == 2
    assert "legal: i2v" in capsys.readouterr().err
    (folder / "metadata.jsonl").write_text(json.dumps({"video": "0.mp4", "caption": " "}) + "\n")
    assert tune(tmp_path, model) == 2
    assert "no caption" in capsys.readouterr().err


def test_clips_go_to_the_size_that_fits(tmp_path: Path) -> None:
    folder = data(tmp_path / "data", 1, image=True)
    sizes = parse_buckets(["9x32x48", "1x64x64"])
    found = clip_latents.check_clips(folder, sizes)
    assert [str(item.size) for item in found] == ["9x32x48", "1x64x64"]
    cover, stretch = (clip_latents.read_fitted(found[0], fit) for fit in ("cover", "stretch"))
    assert cover.frames.shape == stretch.frames.shape == (9, 32, 48, 3)
    assert not torch.equal(cover.frames, stretch.frames)
    with pytest.raises(SettingError):
        clip_latents.check_clips(tmp_path, sizes)
