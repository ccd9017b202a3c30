"""The verb `finetune` from clips on disk to what `generate` loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.__main__ import main
from cogvideox_diff.training import finetune
from cogvideox_diff.training.precompute import LatentReader, Preparation
from shared.checkpoints import load_tensors
from shared.clips import shapes
from shared.clips.buckets import parse_buckets
from shared.clips.dataset import read_clips
from shared.clips.precompute import plan_clips
from shared.video_io import write_video
from tests.cogvideox_diff.tiny_pipeline import FRAMES, HEIGHT, PROMPT, WIDTH, make, write_tokenizer
from tests.shared.clip_files import broken_files, world, write_metadata

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

    monkeypatch.setattr(LatentReader, "read", refuse)
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
    assert tune(tmp_path, model, *sizes, "--pack_tokens", "20") == 2


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_packs_are_refused_under_fsdp_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    data(tmp_path / "data")
    flags = [*SIZE, "--pack_tokens", "60", "--parallel", "fsdp", *more]
    assert tune(tmp_path, model_folder(tmp_path, "5b"), *flags) == 2
    assert "frame packs are for task t2v, and not with --parallel fsdp" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_of_zero_is_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data(tmp_path / "data")
    model = model_folder(tmp_path, "5b")
    assert tune(tmp_path, model, *SIZE, "--lr", "0", "--steps", "1", "--warmup_steps", "0") == 0
    (line,) = (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["lr"] == 0
    assert tune(tmp_path, model, *SIZE, "--lr", "-1", "--dry_run") == 2
    assert "lr must be at least 0, got -1.0" in capsys.readouterr().err


def test_a_batch_has_one_of_several_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data(tmp_path / "data", image=True)
    model, seen = model_folder(tmp_path, "5b"), []
    inner = finetune.diffusion_loss

    def spy(model, schedule, x0, *more, **options):
        seen.append(tuple(x0.shape[:2]))
        return inner(model, schedule, x0, *more, **options)

    monkeypatch.setattr(finetune, "diffusion_loss", spy)
    sizes = ["--sizes", "9x32x48", "1x32x32", "--batch", "2", "--steps", "6"]
    assert tune(tmp_path, model, *sizes) == 0
    # an epoch: three clips of three latent frames, and a still
    assert sorted(seen[:3]) == [(2, 1), (2, 3), (2, 3)]


def test_files_that_cannot_be_read_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one with a good beginning, which shows only when it is decoded."""
    folder = world(tmp_path / "data", 2)
    bad = broken_files(folder)
    write_metadata(folder, dict.fromkeys([*bad, "videos/0.mkv", "videos/1.mkv"], "a red circle"))
    model = model_folder(tmp_path, "5b")
    assert tune(tmp_path, model, "--dry_run", "--num_frames", "17", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["clips"] == 3 and len(told["unusable"]) == len(bad) - 1
    assert tune(tmp_path, model, "--num_frames", "17", "--json", "--num_workers", "2") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_skipped"] == len(bad)
    assert [row["video"] for row in told["skipped"]] == bad and all(row["reason"] for row in told["skipped"])
    only = write_metadata(tmp_path / "only", {f"../data/{bad[0]}": "words"})
    assert tune(tmp_path, model, "--data", str(only)) == 7
    assert "none of 1 clips can be used" in capsys.readouterr().err


def test_precomputed_clips_give_the_adapter_of_the_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever reads ahead: there is one cache, and one order of batches."""
    folder, model = data(tmp_path / "data"), model_folder(tmp_path, "5b")
    assert tune(tmp_path, model, *SIZE, "--num_workers", "2") == 0
    words = ["--input_path", str(folder), "--output_path", str(tmp_path / "made"), "--model_path", str(model)]
    size = ["--sizes", f"{FRAMES}x{HEIGHT}x{WIDTH}", "--frames", "finetune", "--device", "cpu", "--quiet"]
    assert main(["precompute", *words, *size]) == 0
    ours = tmp_path / "out" / "cache"
    for path in ours.rglob("*.safetensors"):
        assert (tmp_path / "made" / path.relative_to(ours)).read_bytes() == path.read_bytes()

    def refuse(*_: object) -> None:
        raise AssertionError("clips were read")

    monkeypatch.setattr(LatentReader, "read", refuse)
    made = ["--data", str(tmp_path / "made"), "--output_path", str(tmp_path / "again")]
    assert tune(tmp_path, model, *made) == 0
    names = [tmp_path / run / "pytorch_lora_weights.safetensors" for run in ("out", "again")]
    first, second = (load_tensors(name) for name in names)
    assert all(first[name].equal(second[name]) for name in first)
    assert tune(tmp_path, model, *made, "--height", "32") == 2
    assert "was precomputed" in capsys.readouterr().err
    other = model_folder(tmp_path / "other", "1.5")
    with pytest.warns(UserWarning, match="made with other weights"):
        tune(tmp_path, other, *made)


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
    clips = read_clips(data(tmp_path / "data", 1, image=True))
    frames = []
    for fit in ("cover", "stretch"):
        preparation = Preparation(
            buckets=parse_buckets(["9x32x48", "1x64x64"]), fps=8.0, frames="finetune", fit=fit
        )  # fmt: skip
        reader = LatentReader(preparation=preparation)
        plans = [planned.plan for planned in plan_clips(clips, reader, quiet=True)]
        assert [plan["bucket"] for plan in plans if plan] == ["9x32x48", "1x64x64"]
        frames.append(
            [reader.read(clip, plan).frames for clip, plan in zip(clips, plans, strict=True) if plan]
        )
    (cover, still), (stretch, _) = frames
    assert cover.shape == stretch.shape == (9, 32, 48, 3) and still.shape == (1, 64, 64, 3)
    assert not torch.equal(cover, stretch)
