"""The verb precompute: posteriors in the VAE's own scale, text features once per caption, sizes by bucket."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideox_diff.__main__ import main
from cogvideox_diff.formats import open_folder
from cogvideox_diff.training import precompute
from cogvideox_diff.training.finetune import FinetuneConfig, objective, trainable
from cogvideox_diff.training.precompute import (
    LatentClips,
    LatentReader,
    Preparation,
    load_encoders,
)
from cogvideox_diff.transformer import ExpertTransformer
from shared.clips.buckets import parse_buckets
from shared.clips.dataset import Clip, Extent, even_count, even_indices
from shared.clips.stream import BatchPlan, ClipStream
from shared.errors import SettingError
from shared.transforms import fit_video
from shared.video import Video
from shared.video_io import read_video, write_video
from tests.cogvideox_diff.tiny_pipeline import make, tiny_config, write_tokenizer
from tests.shared.clip_files import broken_files, killed_at, noise_video, world, write_metadata

CAPTIONS = ("a red circle moves left", "a blue square stays")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make("5b", write_tokenizer(folder)).save_pretrained(folder / "model")


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    code = main(["precompute", "--json", "--device", "cpu", *(str(word) for word in words)])
    return code, json.loads(capsys.readouterr().out)


def some_clips(folder: Path) -> Path:
    """Wide and upright ones of 9 and 17 frames, two captions and an empty one."""
    sizes = [(9, 32, 48), (17, 64, 96), (12, 48, 32), (17, 32, 48), (9, 64, 40)]
    for i, (frames, height, width) in enumerate(sizes):
        write_video(noise_video(frames, height, width, seed=i), folder / f"videos/{i}.mkv")
    said = [*CAPTIONS, "", CAPTIONS[0], CAPTIONS[0]]
    write_metadata(folder, {f"videos/{i}.mkv": caption for i, caption in enumerate(said)})
    return folder


SIZES = ("--sizes", "9x32x48", "17x32x48", "9x48x32")


def test_latents_and_features_are_those_of_the_encoders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    clips, out = some_clips(tmp_path / "clips"), tmp_path / "out"
    code, told = call(capsys, "--input_path", clips, "--output_path", out, "--model_path", model, *SIZES)
    assert code == 0 and (told["num_clips"], told["num_skipped"]) == (5, 0)
    samples, encoders = (
        LatentClips(out),
        load_encoders(open_folder(model), torch.float32, torch.device("cpu")),
    )
    assert samples.groups == ["9x32x48", "17x32x48", "9x48x32", "17x32x48", "9x48x32"]
    assert samples.rows[1]["scale"] == 0.5 and samples.rows[4]["cut_away"] == pytest.approx(1 / 16, abs=0.05)
    for place, row in enumerate(samples.rows):
        frames, height, width = map(int, row["bucket"].split("x"))
        video = read_video(clips / row["video"])
        fitted = fit_video(Video(frames=video.frames[:frames], fps=8), height, width)
        with torch.no_grad():  # with gradients other operators run, which round otherwise
            mean = encoders.vae.encode(fitted.to_pixels()[None]).mean[0].transpose(0, 1)
        sample = samples[place]
        assert torch.equal(sample["latents"], mean)
        assert torch.equal(sample["first_frame"], fitted.frames[0])
        features = encoders.text_encoder(encoders.tokenizer([row["caption"]]).ids)[0]
        assert torch.equal(sample["features"], features)
    assert torch.equal(samples.no_caption, samples[2]["features"])
    index = json.loads((out / "index.json").read_text())
    assert len({row["text"] for row in index["clips"]}) == 3  # a caption is encoded once


def test_precomputed_clips_stream_and_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    clips, out = some_clips(tmp_path / "clips"), tmp_path / "out"
    call(capsys, "--input_path", clips, "--output_path", out, "--model_path", model, *SIZES)
    samples = LatentClips(out)
    plan = BatchPlan(samples.groups, 1, seed=1)
    streams = [iter(ClipStream(samples=samples, plan=plan, num_workers=workers)) for workers in (0, 2)]
    for (step, one), (same, other), _ in zip(*streams, range(6), strict=False):
        assert step == same and all(torch.equal(x, other[name]) for name, x in one.items())
    config = tiny_config("5b")
    torch.manual_seed(0)
    settings = FinetuneConfig(task="i2v", rank=2, batch=2)
    net = trainable(ExpertTransformer(config.transformer), settings)
    vae = load_encoders(open_folder(model), torch.float32, torch.device("cpu")).vae
    loss, _ = objective(net, vae, samples.samples("17x32x48"), config, settings, seed=0)(0)
    loss.backward()
    assert bool(loss.isfinite())
    with pytest.raises(SettingError, match="the clips have the sizes 17x32x48, 9x32x48, 9x48x32; name one"):
        samples.samples()


def test_bad_and_short_files_end_with_7_and_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    clips = world(tmp_path / "clips", 2)
    bad = broken_files(clips)
    write_video(noise_video(8), clips / "videos/short.mkv")
    write_metadata(clips, dict.fromkeys([*bad, "videos/short.mkv", "videos/0.mkv"], CAPTIONS[0]))
    code, told = call(
        capsys, "--input_path", clips, "--output_path", tmp_path / "out", "--model_path", model,
        "--num_workers", 2,
    )  # fmt: skip
    assert code == told["exit_code"] == 7 and told["num_clips"] == 1
    assert [row["video"] for row in told["skipped"]] == [*bad, "videos/short.mkv"]
    assert "8 frames is too short: the shortest size has 9" in told["skipped"][-1]["reason"]


def test_killed_in_the_middle_and_run_again_the_bytes_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--input_path", str(some_clips(tmp_path / "clips")), "--model_path", str(model), *SIZES,
             "--clips_per_shard", "2"]  # fmt: skip
    killed = [*words, "--output_path", str(tmp_path / "killed")]
    encode = precompute.encode_clip

    def work(counted: Any) -> None:
        precompute.encode_clip = counted(encode)
        main(["precompute", "--quiet", "--device", "cpu", *killed])

    assert killed_at(4, work) == -signal.SIGKILL
    assert call(capsys, *words, "--output_path", tmp_path / "whole")[0] == 0
    encoded: list[int] = []
    monkeypatch.setattr(precompute, "encode_clip", lambda *a, **k: (encoded.append(1), encode(*a, **k))[1])
    assert call(capsys, *killed)[0] == 0
    assert len(encoded) == 3  # of five, two were there
    trees = [
        {
            str(p.relative_to(tmp_path / name)): p.read_bytes()
            for p in (tmp_path / name).rglob("*")
            if p.is_file()
        }
        for name in ("killed", "whole")
    ]
    assert trees[0] == trees[1] and len(trees[0]) == 1 + 3 + 2


def test_other_weights_and_settings_are_encoded_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    words = ["--input_path", some_clips(tmp_path / "clips"), "--output_path", tmp_path / "out", *SIZES]
    changed = shutil.copytree(model, tmp_path / "changed")
    tensors = load_file(model / "vae.safetensors")
    save_file({name: x + 0.01 for name, x in tensors.items()}, changed / "vae.safetensors")
    names: list[set[str]] = []
    for source, more in (
        (model, ()),
        (model, ("--frames", "finetune")),
        (model, ("--dtype", "bfloat16")),
        (changed, ()),
    ):
        assert call(capsys, *words, "--model_path", source, *more)[0] == 0
        names.append({path.stem for path in (tmp_path / "out" / "latents").iterdir()})
    assert all(len(one) == 1 for one in names) and len(set.union(*names)) == 4
    assert LatentClips(tmp_path / "out")[0]["latents"].dtype == torch.float32


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--sizes", "9x32"), "FRAMESxHEIGHTxWIDTH"),
        (("--sizes", "9x30x48"), "size 9x30x48: height must be a multiple of 16"),
        (("--sizes", "10x32x48"), "size 10x32x48: frame count must be 8N+1"),
        (("--fps", "0"), "fps must be positive"),
        (("--clips_per_shard", "0"), "at least 1 item"),
    ],
)
def test_illegal_settings_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path, words: tuple[str, ...], reason: str
) -> None:
    clips = world(tmp_path / "clips", 1)
    code, told = call(
        capsys, "--input_path", clips, "--output_path", tmp_path / "out", "--model_path", model, *words
    )
    assert code == 2 and reason in told["reason"]
    assert not (tmp_path / "out").exists()


# ---- frames


@pytest.mark.parametrize(("num_frames", "fps"), [(49, 8.0), (100, 25.0), (61, 29.97), (30, 7.95), (17, 24.0)])
def test_even_frames_lie_nearest_to_even_times(num_frames: int, fps: float) -> None:
    count = even_count(num_frames, fps, 8.0)
    indices = even_indices(fps, 8.0, count)
    assert indices[-1] < num_frames <= even_indices(fps, 8.0, count + 1)[-1] + 1
    assert all(abs(i / fps - place / 8) <= 0.51 / fps for place, i in enumerate(indices) if fps > 8)
    with pytest.raises(SettingError, match="fewer than the 16 asked for"):
        even_count(num_frames, 8.0, 16.0)


@pytest.mark.parametrize(
    ("rule", "num_frames", "fps", "indices"),
    [
        ("even", 30, 24.0, (0, 3, 6, 9, 12, 15, 18, 21, 24)),
        ("even", 30, 20.0, (0, 2, 5, 7, 10, 12, 15, 17, 20)),
        ("sat", 40, 24.0, (3, 6, 9, 12, 15, 18, 21, 24, 27)),
        ("finetune", 30, 24.0, (0, 3, 6, 9, 12, 15, 18, 21, 24)),
        ("finetune", 5, 24.0, (0, 1, 2, 3, 4, 4, 4, 4, 4)),  # padded, as released
    ],
)
def test_frame_rules(rule: Any, num_frames: int, fps: float, indices: tuple[int, ...]) -> None:
    reader = LatentReader(preparation=Preparation(buckets=parse_buckets(["9x32x48"]), fps=8.0, frames=rule))
    clip = Clip(number=0, name="x", video=Path("x"), caption="x")
    plan = reader.plan(clip, Extent(num_frames=num_frames, fps=fps, height=32, width=48))
    assert reader._indices(plan) == indices
