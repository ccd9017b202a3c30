"""Lists of clips in their three forms, and frames by index."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from shared.clips.dataset import content_key, probe, read_clips, read_frames
from shared.errors import SettingError, UserError
from shared.video_io import read_video, write_video
from tests.shared.clip_files import broken_files, noise_video, world, write_clips, write_metadata


def test_metadata_lines_prompts_and_labels_name_the_same_clips(tmp_path: Path) -> None:
    captions = write_clips(tmp_path, 3, num_frames=3, suffix="mp4")
    names = [f"videos/{i}.mp4" for i in range(3)]
    write_metadata(tmp_path / "a", {f"../{name}": said for name, said in zip(names, captions, strict=True)})
    (tmp_path / "videos.txt").write_text("\n\n".join(names) + "\n\n")
    (tmp_path / "prompts.txt").write_text("\n" + "\n".join(captions))
    by_lines = read_clips(tmp_path)
    (tmp_path / "sat" / "labels").mkdir(parents=True)
    (tmp_path / "videos").rename(tmp_path / "sat" / "videos")
    (tmp_path / "videos").symlink_to(tmp_path / "sat" / "videos")
    for i, said in enumerate(captions):
        (tmp_path / "sat" / "labels" / f"{i}.txt").write_text(f"{said}\nanother line\n")
    by_metadata, by_labels = read_clips(tmp_path / "a"), read_clips(tmp_path / "sat")
    for clips in (by_metadata, by_lines, by_labels, read_clips(tmp_path / "videos.txt")):
        assert [clip.caption for clip in clips] == captions
        assert [clip.number for clip in clips] == [0, 1, 2]
        assert [content_key(clip.video) for clip in clips] == [content_key(clip.video) for clip in by_labels]


def test_other_field_names_are_read_and_other_fields_kept(tmp_path: Path) -> None:
    write_clips(tmp_path, 1, num_frames=2)
    path = tmp_path / "metadata.jsonl"
    path.write_text(
        '\ufeff{"file_name": "videos/0.mkv", "text": " x ", "source": "here"}\n\n', encoding="utf-8"
    )
    (clip,) = read_clips(path)
    assert (clip.caption, dict(clip.fields)) == ("x", {"source": "here"})


def test_captions_may_have_the_line_separators_of_unicode(tmp_path: Path) -> None:
    write_clips(tmp_path, 2, num_frames=2)
    said, names = ["a car\u2028on a road", "a\x85b\u2029c\x0cd"], ["videos/0.mkv", "videos/1.mkv"]
    rows = [{"video": name, "caption": caption} for name, caption in zip(names, said, strict=True)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)  # as filter writes
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "videos.txt").write_text("\n".join(names))
    (tmp_path / "prompts.txt").write_text("\r\n".join(said), encoding="utf-8")
    (tmp_path / "labels").mkdir()
    for i, caption in enumerate(said):
        (tmp_path / "labels" / f"{i}.txt").write_text(f"{caption}\nmore", encoding="utf-8")
        (tmp_path / "videos" / f"{i}.mkv").rename(tmp_path / "videos" / f"{i}.mp4")
    lists = [read_clips(tmp_path / name, must_exist=False) for name in ("metadata.jsonl", "videos.txt")]
    for name in ("metadata.jsonl", "videos.txt"):
        (tmp_path / name).unlink()
    for clips in (*lists, read_clips(tmp_path)):
        assert [clip.caption for clip in clips] == said


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "is no list of clips"),
        ({"metadata.jsonl": ""}, "names no clips"),
        ({"metadata.jsonl": "{"}, "line 1 of .* is not JSON"),
        ({"metadata.jsonl": '\n["x"]'}, "line 2 of .* must be an object, got list"),
        ({"metadata.jsonl": '{"video": "x.mp4"}'}, "has no text 'caption' or 'text'"),
        ({"metadata.jsonl": '{"video": "x.mp4", "caption": "x"}'}, "x.mp4 does not exist"),
        ({"videos.txt": "a.mp4\nb.mp4", "prompts.txt": "one"}, "prompts.txt has 1 lines, videos.txt 2"),
        ({"videos.txt": "a.mp4"}, "prompts.txt is missing"),
    ],
)
def test_wrong_lists_are_refused(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SettingError, match=reason):
        read_clips(tmp_path)


def test_content_keys_tell_content_not_names(tmp_path: Path) -> None:
    video, other = noise_video(3), noise_video(3, seed=2)
    first = write_video(video, tmp_path / "a.mkv")
    assert content_key(first) == content_key(write_video(video, tmp_path / "b.mkv"))
    assert content_key(first) != content_key(write_video(other, tmp_path / "c.mkv"))
    frames = [write_video(video, tmp_path / "d"), write_video(video, tmp_path / "e")]
    assert content_key(frames[0]) == content_key(frames[1])
    (frames[1] / "frame_000001.png").unlink()
    assert content_key(frames[0]) != content_key(frames[1])


@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4", "clip.gif", "frames"])
def test_frames_by_index_are_those_of_the_whole_clip(tmp_path: Path, name: str) -> None:
    path = write_video(noise_video(9, 48, 64), tmp_path / name)
    extent = probe(path)
    assert (extent.num_frames, extent.height, extent.width) == (9, 48, 64)
    assert extent.fps == pytest.approx(8, rel=0.01)
    indices = (2, 4, 4, 7)
    picked = read_frames(path, indices, 3.0)
    assert picked.fps == 3 and torch.equal(picked.frames, read_video(path).frames[list(indices)])
    with pytest.raises(UserError, match=re.escape(f"{path} ends after 9 frames")):
        read_frames(path, (2, 9), 3.0)


def test_what_is_no_video_is_refused_by_name(tmp_path: Path) -> None:
    world(tmp_path, 1)
    for name in broken_files(tmp_path):
        with pytest.raises(UserError, match=re.escape(name)):
            read_frames(tmp_path / name, tuple(range(probe(tmp_path / name).num_frames)), 8.0)
