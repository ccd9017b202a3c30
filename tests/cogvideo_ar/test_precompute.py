"""The verb precompute: image tokens at the lowest frame rate that fits, texts with their frame-rate token."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo_ar.__main__ import main
from cogvideo_ar.config import cogvideo, cogvideo_demo
from cogvideo_ar.formats import open_folder
from cogvideo_ar.parts import save_parts
from cogvideo_ar.training import precompute
from cogvideo_ar.training.precompute import (
    TokenSamples,
    fitting_rates,
    known_rates,
    load_encoders,
)
from shared.clips.dataset import Extent, even_indices
from shared.clips.stream import BatchPlan, ClipStream
from shared.errors import SettingError
from shared.transforms import fit_video
from shared.video import Video
from shared.video_io import read_video
from tests.cogvideo_ar.tiny_pipeline import tiny_parts
from tests.shared.clip_files import broken_files, killed_at, world, write_clips, write_metadata


def extent(num_frames: int, fps: float) -> Extent:
    return Extent(num_frames=num_frames, fps=fps, height=64, width=64)


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    code = main(["precompute", "--json", "--device", "cpu", *(str(word) for word in words)])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_parts(tiny_parts(folder), folder / "model")


@pytest.mark.parametrize(
    ("num_frames", "fps", "lowest"),
    [
        (17, 8.0, 2.0),
        (16, 8.0, 4.0),
        (9, 8.0, 4.0),
        (8, 8.0, 8.0),
        (5, 8.0, 8.0),
        (121, 30.0, 1.0),
        (120, 30.0, 2.0),
        (100, 7.94, 1.0),
    ],
)
def test_a_clip_takes_the_lowest_rate_that_yields_five_frames(
    num_frames: int, fps: float, lowest: float
) -> None:
    rates = (1.0, 2.0, 4.0, 8.0)
    fitting = fitting_rates(extent(num_frames, fps), 5, rates)
    assert fitting == tuple(rate for rate in rates if rate >= lowest)
    for rate in rates:
        indices = even_indices(fps, rate, 5)
        assert len(set(indices)) == 5
        assert (indices[-1] < num_frames) == (rate in fitting)
        assert all(abs(i / fps - place / rate) <= 0.51 / fps for place, i in enumerate(indices) if rate < fps)


@pytest.mark.parametrize(("num_frames", "fps"), [(4, 8.0), (100, 3.0)])
def test_clips_that_no_rate_fits_are_refused(num_frames: int, fps: float) -> None:
    with pytest.raises(SettingError, match="do not yield 5 at any of 4, 8"):
        fitting_rates(extent(num_frames, fps), 5, (8.0, 4.0))


def test_predefined_rates_are_those_of_the_models_frame_rate_tokens() -> None:
    assert known_rates(cogvideo_demo()) == (2.0, 4.0, 8.0)
    assert set(known_rates(cogvideo())) >= {1.0, 2.0, 4.0}


def test_tokens_and_texts_are_those_of_the_codec_and_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    """Two lengths, so two rates; the texts are what the key-frame stage is given."""
    clips = tmp_path / "clips"
    for name, num_frames in (("long", 17), ("short", 9)):
        write_clips(clips / name, 1, num_frames=num_frames)
    write_metadata(clips, {"long/videos/0.mkv": "a red circle", "short/videos/0.mkv": "a blue square"})
    code, told = call(capsys, "--input_path", clips, "--output_path", tmp_path / "out", "--model_path", model)
    assert code == 0 and (told["num_clips"], told["num_skipped"]) == (2, 0)
    samples = TokenSamples(tmp_path / "out")
    assert samples.rates == [2.0, 4.0]
    encoders = load_encoders(open_folder(model), torch.device("cpu"))
    texts = encoders.texts
    for i, (name, caption, stride, duration) in enumerate(
        [("long", "a red circle", 4, "2.0秒"), ("short", "a blue square", 2, "1.0秒")]
    ):
        video = read_video(clips / name / "videos/0.mkv")
        five = fit_video(Video(frames=video.frames[::stride][:5], fps=8), 16, 32)
        codes = encoders.vqvae.encode(five.to_pixels().transpose(0, 1), 8).flatten(1)
        assert torch.equal(samples[i]["codes"], codes.int())
        ids = [token for token in samples[i]["text"].tolist() if token != texts.config.keyframes.pad_token]
        tokenizer = texts.tokenizer
        assert ids == [*tokenizer.encode(duration), tokenizer.id_of("<n>"), *tokenizer.encode(caption)]
        assert samples[i]["text"][-1] == ids[-1]  # padded on the left


def test_every_fitting_rate_on_request_and_long_texts_are_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    clips = world(tmp_path / "clips", 1)
    write_metadata(clips, {"videos/0.mkv": "a red circle moving left " * 20})
    words = ("--input_path", clips, "--output_path", tmp_path / "out", "--model_path", model)
    code, _ = call(capsys, *words, "--take", "all", "--rates", 8, 2, 4, 16)
    samples = TokenSamples(tmp_path / "out")
    assert code == 0 and samples.rates == [2.0, 4.0, 8.0] and len(samples) == 3
    assert samples[0]["text"].shape == (28,) and samples[2]["codes"].shape == (5, 8)
    assert torch.equal(samples[0]["codes"][1], samples[1]["codes"][2])  # the same frame of the clip


def test_bad_files_end_with_7_and_are_listed_and_good_ones_stream(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    clips = world(tmp_path / "clips", 4)
    bad = broken_files(clips)
    good = [f"videos/{i}.mkv" for i in range(4)]
    write_metadata(clips, dict.fromkeys([*good[:2], *bad, *good[2:]], "a red circle"))
    code, told = call(
        capsys, "--input_path", clips, "--output_path", tmp_path / "out", "--model_path", model,
        "--num_workers", 2,
    )  # fmt: skip
    assert code == told["exit_code"] == 7 and not told["ok"]
    assert [row["video"] for row in told["skipped"]] == bad
    samples = TokenSamples(tmp_path / "out")
    assert [row["video"] for row in samples.rows] == good
    plan = BatchPlan(samples.groups, 2, seed=1)
    batches = [next(iter(ClipStream(samples=samples, plan=plan, num_workers=workers))) for workers in (0, 2)]
    assert batches[0][1].keys() == {"codes", "rate", "text"} and batches[0][1]["codes"].shape == (2, 5, 8)
    assert all(torch.equal(x, batches[1][1][name]) for name, x in batches[0][1].items())
    write_metadata(clips, dict.fromkeys(bad[1:], "a red circle"))
    code, told = call(
        capsys, "--input_path", clips, "--output_path", tmp_path / "none", "--model_path", model
    )
    assert code == 7 and "none of 4 clips can be used" in told["reason"]
    assert not (tmp_path / "none").exists()


def test_killed_in_the_middle_and_run_again_the_bytes_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = world(tmp_path / "clips", 9)
    words = ["--input_path", str(clips), "--model_path", str(model), "--clips_per_shard", "2"]
    killed = [*words, "--output_path", str(tmp_path / "killed")]
    encode = precompute.encode_frames

    def work(counted: Any) -> None:
        precompute.encode_frames = counted(encode)
        main(["precompute", "--quiet", "--device", "cpu", *killed])

    assert killed_at(6, work) == -signal.SIGKILL
    assert len(list((tmp_path / "killed").rglob("*.safetensors"))) == 2
    assert call(capsys, *words, "--output_path", tmp_path / "whole")[0] == 0
    encoded: list[object] = []
    monkeypatch.setattr(precompute, "encode_frames", lambda *given: (encoded.append(1), encode(*given))[1])
    assert call(capsys, *killed)[0] == 0
    assert len(encoded) == 5  # of nine, four were there
    trees = [
        {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("killed", "whole")
    ]
    assert trees[0] == trees[1] and len(trees[0]) == 6
