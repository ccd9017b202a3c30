"""The command cogvideo-data: folders of clips."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from shared.clips import shapes
from shared.clips.__main__ import main
from shared.clips.commands import shapes as command
from shared.errors import SettingError
from shared.video_io import read_video


def call(*words: str) -> int:
    return main(["shapes", "--quiet", *words])


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_the_folder_holds_the_clips_and_says_what_they_show(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "clips"
    assert call("--output_path", str(folder), "--num_videos", "5", "--format", "mkv", "--seed", "3") == 0
    rows = [json.loads(line) for line in lines(folder / "metadata.jsonl")]
    assert [row["caption"] for row in rows] == lines(folder / "prompts.txt")
    assert [row["video"] for row in rows] == lines(folder / "videos.txt")
    for scene, row in zip(islice(shapes.scenes("train", 3), 5), rows, strict=True):
        video = read_video(folder / row["video"])
        assert torch.equal(video.frames, shapes.render(scene).frames)
        assert row["caption"] == scene.caption.text
        assert scene.caption.attributes().items() <= row.items()
        about = (row["num_frames"], row["height"], row["width"], row["fps"])
        assert about == (video.num_frames, video.height, video.width, video.fps)
    assert {path.name for path in folder.iterdir()} == command.OUR_FILES


def test_mp4_clips_of_the_heldout_split_are_read_right(tmp_path: Path) -> None:
    assert call("--output-path", str(tmp_path / "c"), "--num-videos", "4", "--split", "heldout",
                "--num-frames", "9") == 0  # fmt: skip
    for line in lines(tmp_path / "c" / "metadata.jsonl"):
        row = json.loads(line)
        assert row["video"].endswith(".mp4") and row["num_frames"] == 9
        reading = shapes.read(read_video(tmp_path / "c" / row["video"]))
        wanted = shapes.parse(row["caption"])
        assert reading.valid and all(reading.agrees(wanted).values())
        triple = (wanted["colour"], wanted["shape"], wanted["motion"])
        assert triple in {(c.colour, c.shape, c.motion) for c in shapes.captions("heldout")}


def test_the_same_call_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        assert call("--output_path", str(tmp_path / name), "--num_videos", "2", "--format", "mkv") == 0
    for path in (p for p in (tmp_path / "a").rglob("*") if p.suffix in (".jsonl", ".txt")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_an_existing_folder_is_kept_unless_overwriting_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clips"
    assert call("--output_path", str(folder), "--num_videos", "3") == 0
    before = (folder / "metadata.jsonl").read_bytes()
    assert call("--output_path", str(folder), "--num_videos", "1") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "metadata.jsonl").read_bytes() == before
    assert call("--output_path", str(folder), "--num_videos", "1", "--overwrite") == 0
    assert len(lines(folder / "videos.txt")) == len(list((folder / "videos").iterdir())) == 1


def test_overwriting_spares_what_is_not_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert call("--output_path", str(tmp_path), "--num_videos", "1", "--overwrite") == 2
    assert "thesis.txt" in capsys.readouterr().err
    file = tmp_path / "thesis.txt"
    assert call("--output_path", str(file), "--num_videos", "1", "--overwrite") == 2
    assert file.read_text() == "mine"


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = command.write_video, []

    def failing(*args: object, **options: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(write(*args, **options))  # type: ignore[arg-type]

    monkeypatch.setattr(command, "write_video", failing)
    assert call("--output_path", str(tmp_path / "clips"), "--num_videos", "4") == 130
    assert len(written) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--num_videos", "0"), "num_videos must be at least 1, got 0"),
        (("--num_frames", "18"), "num_frames must be in 1..17"),
        (("--seed", "-1"), "seed must not be negative"),
        (("--split", "test"), "invalid choice: 'test'"),
        (("--format", "avi"), "invalid choice: 'avi'"),
        (("--num_video", "3"), "nearest: '--num_videos'"),
    ],
)
def test_wrong_flags_are_one_line(
    words: tuple[str, ...], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = call("--output_path", str(tmp_path / "clips"), *words)
    except SystemExit as ended:  # argparse's own errors
        code = ended.code
    said = capsys.readouterr().err
    assert code == SettingError.exit_code
    assert reason in said and said.count("\n") == 1
    assert not (tmp_path / "clips").exists()


def test_json_says_what_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--output_path", str(tmp_path / "c"), "--num_videos", "1", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"ok": True, "output_path": str(tmp_path / "c"), "num_videos": 1}
