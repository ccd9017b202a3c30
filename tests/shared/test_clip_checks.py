"""Faults of clips, what is measured of them, and lists of the good ones."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.clips import measures, shapes
from shared.clips.__main__ import main
from shared.clips.buckets import Bucket, assign, losses, parse_buckets
from shared.clips.checks import ADVICE, CheckSettings, find_faults
from shared.clips.dataset import Clip, read_clips
from shared.clips.filters import caption_words
from shared.clips.measures import Measured, Measures, measure, measure_all
from shared.errors import SettingError
from shared.video import Video
from shared.video_io import write_video
from tests.shared.clip_files import broken_files, noise_video, scenes, world, write_metadata


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    """Exit code and the JSON object that the command said."""
    code = main([*(str(word) for word in words), "--json"])
    return code, json.loads(capsys.readouterr().out)


# ---- check


def faulty(folder: Path) -> dict[str, set[str]]:
    """Two good clips and every fault there is; returns the faults by video."""
    world(folder, 2)
    (good, other) = scenes(2)
    write_video(shapes.render(good), folder / "videos/again.mp4", quality=10)
    shutil.copyfile(folder / "videos/1.mkv", folder / "videos/copy.mkv")
    still = replace(other, travel=0.0)
    write_video(shapes.render(still), folder / "videos/still.mkv")
    write_video(noise_video(3), folder / "videos/short.mkv")
    broken = broken_files(folder)
    faults = {
        "videos/0.mkv": set(),
        "videos/1.mkv": {"empty_caption"},
        "videos/again.mp4": {"near_duplicate"},
        "videos/copy.mkv": {"duplicate"},
        "videos/still.mkv": {"static"},
        "videos/short.mkv": {"short"},
        "videos/nowhere.mkv": {"missing"},
        **{name: {"unreadable"} for name in broken},
    }
    write_metadata(folder, {name: "" if name == "videos/1.mkv" else "words" for name in faults})
    return faults


def test_check_finds_every_fault_and_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = faulty(tmp_path)
    code, said = call(capsys, "check", "--input_path", tmp_path)
    found: dict[str, set[str]] = {name: set() for name in faults}
    for row in said["findings"]:
        found[row["video"]].add(row["kind"])
        assert row["advice"] == ADVICE[row["kind"]] and row["detail"]
    assert found == faults
    assert code == said["exit_code"] == 7 and not said["ok"]
    assert (said["num_clips"], said["num_bad"]) == (len(faults), len(faults) - 1)
    assert said["counts"]["unreadable"] == 5
    assert json.loads((tmp_path / "check.json").read_text())["findings"] == said["findings"]
    kinds = set().union(*faults.values())
    assert kinds == set(ADVICE)
    code, said = call(capsys, "check", "--input_path", tmp_path, "--allow", *sorted(kinds))
    assert code == 0 and said["ok"] and said["num_bad"] == 0
    assert not any(row["counts"] for row in said["findings"])


def test_sentences_name_every_finding_and_how_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = faulty(tmp_path)
    assert main(["check", "--input_path", str(tmp_path), "--quiet"]) == 7
    out = capsys.readouterr().out
    assert "clip 3 (videos/copy.mkv): duplicate: the same bytes as clip 1 (videos/1.mkv)" in out
    assert "cut off" in out or "damaged" in out
    assert "no video stream" in out
    assert f"unreadable (5): {ADVICE['unreadable']}" in out
    assert f"{len(faults)} clips, {len(faults) - 1} bad" in out


def test_a_good_list_ends_with_0_and_unknown_kinds_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world(tmp_path, 3)
    code, said = call(capsys, "check", "--input_path", tmp_path)
    assert (code, said["num_bad"], said["findings"]) == (0, 0, [])
    code, said = call(capsys, "check", "--input_path", tmp_path, "--allow", "statik")
    assert code == 2 and "statik" in said["reason"]
    code, said = call(capsys, "check", "--input_path", tmp_path, "--min_frames", 20)
    assert code == 7 and said["counts"] == {"short": 3}


def test_no_near_copy_is_missed() -> None:
    """Against all pairs, for signatures of which many are just within or beyond the border."""
    rng = np.random.default_rng(3)
    bases = rng.integers(40, 210, size=(6, 960))
    rows = [np.clip(bases[i % 6] + rng.normal(0, rng.uniform(0, 4), 960), 0, 255).round() for i in range(80)]
    signatures = [base64.b64encode(row.astype(np.uint8).tobytes()).decode() for row in rows]
    clips = [Clip(number=i, name=str(i), video=Path("x"), caption="x") for i in range(80)]
    measured = [
        Measured(
            clip=clip, key=str(clip.number), measures=Measures(signature=s, num_frames=9, fps=8, change=9)
        )
        for clip, s in zip(clips, signatures, strict=True)
    ]
    near = {i for i in range(80) if any(np.abs(rows[i] - rows[k]).mean() <= 2 for k in range(i))}
    found = find_faults(measured, CheckSettings())
    assert {finding.number for finding in found} == near and 10 < len(near) < 80
    assert {finding.kind for finding in found} == {"near_duplicate"}


# ---- measures


def test_scores_are_kept_by_content_and_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world(tmp_path, 3)
    clips, path = read_clips(tmp_path), tmp_path / "scores.jsonl"
    first = measure_all(clips, path, quiet=True)
    text = path.read_text()
    path.write_text(
        "".join(text.splitlines(keepends=True)[:1]) + text.splitlines()[1][:40]
    )  # as after a crash
    decoded: list[Path] = []
    monkeypatch.setattr(measures, "measure", lambda path: (decoded.append(path), measure(path))[1])
    (tmp_path / "videos/0.mkv").rename(tmp_path / "videos/moved.mkv")
    names = ["videos/moved.mkv", "videos/1.mkv", "videos/2.mkv"]
    write_metadata(tmp_path, dict.fromkeys(names, "words"))
    again = measure_all(read_clips(tmp_path), path, quiet=True)
    assert [path.name for path in decoded] == ["1.mkv", "2.mkv"]
    assert [m.measures for m in again] == [m.measures for m in first]
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()[2:]] == [
        m.key for m in first[1:]
    ]


def test_worker_processes_measure_the_same(tmp_path: Path) -> None:
    world(tmp_path, 3)
    (tmp_path / "videos/1.mkv").write_bytes(b"")
    clips = read_clips(tmp_path)
    alone = measure_all(clips, tmp_path / "a.jsonl", quiet=True)
    shared = measure_all(clips, tmp_path / "b.jsonl", num_workers=2, quiet=True)
    assert alone == shared and alone[1].measures.problem
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_motion_grows_with_speed_and_cuts_are_found(tmp_path: Path) -> None:
    slow, quick = (
        next(s for s in shapes.scenes("train", 8) if s.caption.speed == speed) for speed in shapes.SPEEDS
    )
    still = replace(slow, travel=0.0)
    values = [
        measure(write_video(shapes.render(scene), tmp_path / f"{i}.mkv"))
        for i, scene in enumerate((still, slow, quick))
    ]
    assert values[0].motion == values[0].change == 0
    assert 0.02 < values[1].motion < values[2].motion
    assert all(v.cuts == () for v in values)
    joined = torch.cat([shapes.render(scene, num_frames=6).frames for scene in scenes(3)])
    assert measure(write_video(Video(frames=joined, fps=8), tmp_path / "cut.mp4")).cuts == (6, 12)
    assert measure(write_video(noise_video(12), tmp_path / "noise.mkv")).cuts == ()  # flicker, not scenes


# ---- filter


def test_filter_lists_what_keeps_the_bounds_over_the_same_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty(tmp_path / "all")
    target = tmp_path / "good" / "metadata.jsonl"
    words = ("filter", "--input_path", tmp_path / "all", "--output_path", target)
    bounds = ("--min_motion", "0.02", "--min_caption_words", "1", "--min_frames", "5", "--max_cuts", "0")
    code, said = call(capsys, *words, *bounds)
    kept = read_clips(target)
    assert code == 0 and said["num_kept"] == len(kept) == 3
    assert [clip.video.resolve().name for clip in kept] == ["0.mkv", "again.mp4", "copy.mkv"]
    assert said["reasons"]["unreadable"] == 6 and said["reasons"]["min_motion"] == 1
    assert kept[0].fields["scores"]["num_frames"] == 17
    reasons = {row["video"]: row["reasons"] for row in said["dropped"]}
    assert "min_frames" in reasons["videos/short.mkv"]
    assert reasons["videos/1.mkv"] == ["min_caption_words"]
    code, said = call(capsys, *words)
    assert code == 2 and "already exists" in said["reason"]
    code, said = call(capsys, *words, "--overwrite", "--min_height", 65)
    assert code == 2 and "none of 12 clips is left" in said["reason"] and "min_height" in said["reason"]
    assert len(read_clips(target)) == 3  # as it was
    code, said = call(capsys, *words, "--overwrite", "--min_fps", 9, "--max_fps", 8)
    assert code == 2 and "min_fps 9.0 is above max_fps 8.0" in said["reason"]


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("a red circle", 3), ("一个红色的圆", 6), ("红 circle moves", 3)]
)
def test_words_are_counted_in_both_scripts(text: str, count: int) -> None:
    assert caption_words(text) == count


# ---- buckets


BUCKETS = parse_buckets(["49x480x720", "49x720x480", "17x480x720", "17x480x480", "49x480x720"])


@pytest.mark.parametrize(
    ("clip", "rule", "wanted"),
    [
        ((120, 1080, 1920), "aspect", "49x480x720"),
        ((120, 1920, 1080), "aspect", "49x720x480"),
        ((48, 1080, 1920), "aspect", "17x480x720"),
        ((17, 500, 510), "aspect", "17x480x480"),
        ((49, 500, 510), "aspect", "49x480x720"),  # no square one is that long; of equals the first
        ((60, 480, 700), "size", "49x480x720"),
        ((60, 1920, 1080), "size", "49x720x480"),  # a tie, which the aspect decides
        ((17, 1080, 1090), "size", "17x480x720"),  # the larger, whatever is cut away
    ],
)
def test_clips_go_to_the_nearest_legal_size(clip: tuple[int, int, int], rule: Any, wanted: str) -> None:
    assert str(assign(*clip, BUCKETS, rule)) == wanted


def test_sizes_are_parsed_or_refused_and_losses_told() -> None:
    assert len(BUCKETS) == 4 and str(Bucket.parse("17x480x480")) == "17x480x480"
    for text in ("480x720", "0x480x720", "49x480x720x3", "49 480 720"):
        with pytest.raises(SettingError, match="FRAMESxHEIGHTxWIDTH"):
            Bucket.parse(text)
    with pytest.raises(SettingError, match="16 frames is too short: the shortest size has 17"):
        assign(16, 480, 720, BUCKETS)
    assert losses(480, 720, Bucket.parse("9x480x480")) == {"cut_away": 0.3333, "scale": 1.0}
    assert losses(240, 240, Bucket.parse("9x480x480")) == {"cut_away": 0.0, "scale": 2.0}
