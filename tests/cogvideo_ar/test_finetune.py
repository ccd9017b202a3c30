"""The verb finetune: the temporal channel learns, the base stays; samples, logs, resuming, refusals."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogvideo_ar.__main__ import main
from cogvideo_ar.formats import open_folder
from cogvideo_ar.layout import keyframe_layout, training_batch
from cogvideo_ar.parts import Parts, load_parts, save_parts
from cogvideo_ar.training import objective, tuning
from cogvideo_ar.training.precompute import TokenSamples
from cogvideo_ar.training.tuning import Job, make_batch, trainable
from cogvideo_ar.transformer import CogVideoTransformer
from shared import training
from shared.checkpoints import load_tensors
from shared.clips.stream import stacked
from shared.errors import BatchError, SettingError
from shared.training import Interrupted, TrainConfig
from tests.cogvideo_ar.tiny import tiny_config, wild_model
from tests.cogvideo_ar.tiny_pipeline import tiny_parts
from tests.shared.clip_files import broken_files, world, write_clips, write_metadata

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_parts(tiny_parts(folder), folder / "model")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip that fits 2 frames a second, and one that only fits 4."""
    folder = tmp_path_factory.mktemp("clips")
    for name, num_frames in (("long", 17), ("short", 9)):
        write_clips(folder / name, 1, num_frames=num_frames)
    write_metadata(folder, {"long/videos/0.mkv": "a red circle", "short/videos/0.mkv": "a blue square"})
    return folder


@pytest.fixture(scope="module")
def tokens(model: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    words = ["precompute", "--input_path", str(clips), "--output_path", str(folder), "--quiet"]
    assert main([*words, "--model_path", str(model), "--device", "cpu", "--take", "all"]) == 0
    return folder


def finetune(model: Path, data: Path, output: Path, *words: object) -> int:
    flags = ["--model_path", model, "--data", data, "--output_path", output, "--device", "cpu", "--quiet"]
    settings = ["--steps", 3, "--batch", 2, "--warmup_steps", 1, "--lr", 1e-2]
    return main(["finetune", *(str(word) for word in (*flags, *settings, *words))])


def job_of(model: Path, data: Path, output: Path, **settings: Any) -> Job:
    given = {"stage": 1, "train": TrainConfig(steps=3, warmup_steps=1), "batch": 2, "quiet": True}
    return Job(folder=open_folder(model), data=data, output=output, **(given | settings))


def changed(before: torch.nn.Module, after: torch.nn.Module) -> set[str]:
    old = before.state_dict()
    return {name for name, x in after.state_dict().items() if not torch.equal(x, old[name])}


# ---- what learns


@pytest.mark.parametrize(
    ("stage", "learning", "other"), [(1, "keyframes", "interpolation"), (2, "interpolation", "keyframes")]
)
def test_the_base_is_frozen_and_the_temporal_channel_learns(
    model: Path, clips: Path, tmp_path: Path, stage: int, learning: str, other: str
) -> None:
    assert finetune(model, clips, tmp_path, "--stage", stage, "--sample_prompts", "a red circle") == 0
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["0000003-prompt-0.gif"]
    before, after = (load_parts(path, torch.float32, CPU) for path in (model, tmp_path / "model"))
    net: CogVideoTransformer = getattr(after, learning)
    names = changed(getattr(before, learning), net)
    temporal = {name for name, _ in net.temporal_parameters()}
    assert names and names <= temporal
    assert {name for name in names if "temporal.qkv" in name} and {n for n in names if n.endswith("mix")}
    assert not changed(getattr(before, other), getattr(after, other))
    stored = load_tensors(tmp_path / "model" / "interpolation.safetensors", device="meta")
    assert set(stored) == {name for name, _ in after.interpolation.temporal_parameters()}
    assert losses(tmp_path) == ({f"frame{t}" for t in (1, 2, 3, 4)} if stage == 1 else {"frame1", "frame3"})


def losses(run: Path) -> set[str]:
    last = json.loads((run / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert all(np.isfinite(x) for name, x in last.items() if name.startswith("frame"))
    return {name for name in last if name.startswith("frame")}


def test_all_channels_on_request(model: Path, tokens: Path, tmp_path: Path) -> None:
    """Then the stages no longer share their base."""
    assert finetune(model, tokens, tmp_path, "--train", "all") == 0
    before, after = (load_parts(path, torch.float32, CPU) for path in (model, tmp_path / "model"))
    assert "blocks.0.attention.spatial.qkv.weight" in changed(before.keyframes, after.keyframes)
    assert not changed(before.interpolation, after.interpolation)
    assert not (tmp_path / "tokens").exists()  # what was precomputed is read where it is


def test_a_half_precision_model_keeps_its_dtype(model: Path, tokens: Path, tmp_path: Path) -> None:
    half = save_parts(load_parts(model, torch.float16, CPU), tmp_path / "half")
    with pytest.warns(UserWarning, match="made with other weights"):
        assert finetune(half, tokens, tmp_path, "--stage", 2) == 0
    stored = load_tensors(tmp_path / "model" / "interpolation.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.float16}
    before, after = (load_parts(path, torch.float16, CPU) for path in (half, tmp_path / "model"))
    assert not changed(before.keyframes, after.keyframes)


def test_a_new_start_is_the_base_channel() -> None:
    """Copied with its output too, the temporal channel of a first frame gives what the base gives, so the
    mix is the base; the released start draws the output."""
    wild = wild_model(tiny_config())
    new = trainable(wild, "temporal", start="base").double()
    for block in new.blocks:
        assert torch.equal(block.attention.temporal.qkv.weight, block.attention.spatial.qkv.weight)
        assert not block.attention.mix.any()
        assert not torch.equal(block.attention.temporal.out.weight, block.attention.spatial.out.weight)
    assert changed(wild.float(), new.float()) == {name for name, _ in new.temporal_parameters()}
    new.double().init_temporal_from_base(copy_out=True)
    layout = keyframe_layout(new.config, 6)
    ids = torch.randint(0, 20, (2, layout.length), generator=torch.Generator().manual_seed(1))
    base = CogVideoTransformer(tiny_config(temporal="none")).double()
    base.load_state_dict({name: x for name, x in new.base_parameters()})
    first = slice(layout.text_len, layout.text_len + layout.frame_len)
    with torch.no_grad():
        dual = new.eval().hidden(ids, layout)
        alone = base.eval().hidden(
            ids[:, : first.stop], keyframe_layout(base.config, 6, num_frames=1, num_given=0)
        )
    torch.testing.assert_close(dual[:, first], alone[:, first], atol=1e-12, rtol=0)
    assert not torch.allclose(dual[:, first.stop :].mean(), dual[:, first].mean())


# ---- samples


def test_stages_take_their_rates(model: Path, tokens: Path, tmp_path: Path) -> None:
    """The clip of 17 frames at 8 per second gives 2, 4 and 8; interpolation makes 4 and 8."""
    assert TokenSamples(tokens).rates == [2.0, 4.0, 8.0, 4.0, 8.0]
    first, second = (job_of(model, tokens, tmp_path, stage=stage) for stage in (1, 2))
    assert (first.rates, second.rates) == ((2.0, 4.0, 8.0), (4.0, 8.0))
    samples, _ = tuning._prepared(second)
    assert [float(samples[i]["rate"]) for i in range(len(samples))] == [4.0, 8.0, 4.0, 8.0]


def test_clips_of_stage_1_come_at_their_lowest_rate(model: Path, clips: Path, tmp_path: Path) -> None:
    samples, _ = tuning._prepared(job_of(model, clips, tmp_path))
    assert [float(samples[i]["rate"]) for i in range(len(samples))] == [2.0, 4.0]


def test_batches_have_texts_with_their_rate_and_some_without_caption(
    model: Path, tokens: Path, tmp_path: Path
) -> None:
    job = job_of(model, tokens, tmp_path, batch=40, text_dropout=0.3)
    samples, texts = tuning._prepared(job)
    rows = stacked([samples[i % len(samples)] for i in range(40)])
    batch = make_batch(rows, texts, job, np.random.default_rng(0))
    line, tokenizer = texts.tokenizer.id_of("<n>"), texts.tokenizer
    said = [row[valid].tolist() for row, valid in zip(batch.tokens[:, :28], batch.text_valid, strict=True)]
    times = {2.0: "2.0秒", 4.0: "1.0秒", 8.0: "0.5秒"}
    heads = {tuple(row[: row.index(line)]) for row in said}
    assert heads == {tuple(tokenizer.encode(text)) for text in times.values()}
    assert 4 < sum(row[-1] == line for row in said) < 22
    again = make_batch(rows, texts, job, np.random.default_rng(0))
    assert torch.equal(again.tokens, batch.tokens)
    assert batch.labels.max() < 32 and bool(batch.loss_mask[:, 1:].all()) and not batch.loss_mask[:, 0].any()


def test_batches_go_where_the_model_is() -> None:
    config = tiny_config()
    layout = keyframe_layout(config, 4)
    text, frames = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 5, 16, dtype=torch.long)
    batch = training_batch(layout, text, frames, start_of_image=24, text_valid_BT=text == 0)
    with torch.device("meta"):
        model = CogVideoTransformer(config)
    moved = objective._moved(batch, model)
    assert {x.device.type for x in (moved.tokens, moved.labels, moved.loss_mask, moved.text_valid)} == {
        "meta"
    }
    assert objective._moved(batch, wild_model(config)) is batch


# ---- runs


def stopped_train(*args: Any, **options: Any) -> Path:
    return training.train(
        *args, **options, after_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None
    )


def test_an_interrupted_run_resumes_exactly(
    model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(model, tokens, tmp_path / "whole", stage=2)
    whole = tuning.tune(job).path
    job = replace(job, output=tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "train", stopped_train)
        with pytest.raises(Interrupted):
            tuning.tune(job)
    resumed = tuning.tune(replace(job, num_workers=1)).path
    for name in ("keyframes", "interpolation"):
        file = f"{name}.safetensors"
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()


def refuse(*args: Any, **options: Any) -> Parts:
    raise AssertionError("weights were read")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--text_dropout", "1"], "text_dropout"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--device", "cud"], "unknown device 'cud'"),
    ],
)
def test_checks_come_before_the_weights(
    model: Path,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("cogvideo_ar.formats.load_parts", refuse)
    assert finetune(model, tokens, tmp_path, "--json", *words) == 2
    assert message in json.loads(capsys.readouterr().out)["reason"]


def test_samples_that_do_not_fit_are_refused(model: Path, tokens: Path, tmp_path: Path) -> None:
    index = json.loads((tokens / "index.json").read_text())
    for change, message in (
        ({"clips": [row | {"rates": [2.0]} for row in index["clips"]]}, r"stage 2 \(4, 8\); .*--take all"),
        ({"settings": index["settings"] | {"height": 64}}, r"\(5, 64, 32\), the model \(5, 16, 32\)"),
    ):
        (tmp_path / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(SettingError, match=message):
            job_of(model, tmp_path, tmp_path, stage=2).check()


def test_files_that_cannot_be_read_are_left_out_and_told(model: Path, tmp_path: Path, capsys: Any) -> None:
    folder = world(tmp_path / "clips", 2)
    bad = broken_files(folder)
    write_metadata(folder, dict.fromkeys([*bad, "videos/0.mkv", "videos/1.mkv"], "a red circle"))
    assert finetune(model, folder, tmp_path / "out", "--json", "--num_workers", 1) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["num_skipped"] == len(said["skipped"]) and {row["video"] for row in said["skipped"]} <= set(
        bad
    )
    assert len(said["skipped"]) >= 4 and all(row["reason"] for row in said["skipped"])
    only = write_metadata(tmp_path / "only", {f"../clips/{bad[0]}": "words"})
    assert finetune(model, only, tmp_path / "none") == 7 and "none of 1 clips" in capsys.readouterr().err
    shard = next((tmp_path / "out" / "tokens" / "tokens").glob("*.safetensors"))
    found = TokenSamples(tmp_path / "out" / "tokens")
    stream = tuning.streamed(
        tuning.StageSamples(samples=found, places=(0, 1)), job_of(model, folder, tmp_path)
    )
    shard.unlink()
    with pytest.raises(BatchError, match="no sample of step 0 can be read"):
        stream.at(0)


def test_a_dry_run_trains_nothing(model: Path, clips: Path, tmp_path: Path, capsys: Any) -> None:
    assert finetune(model, clips, tmp_path / "out", "--dry_run", "--json", "--stage", 2) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["clips"] == 2 and said["rates"] == [4.0, 8.0] and not (tmp_path / "out" / "run").exists()
