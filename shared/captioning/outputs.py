"""The files that a run of captioning leaves: a list of clips with their new captions, and examples to learn
captioning from, in the chat format (an object a line with "messages")."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.captioning.instructions import summary_messages
from shared.captioning.pipeline import ClipCaptions, Outcome
from shared.clips.dataset import CAPTION_FIELDS, METADATA, VIDEO_FIELDS, VIDEOS, Clip, folder_of, read_clips
from shared.errors import OutputPathError, SettingError
from shared.files import atomic_path, write_json

SUMMARISER, CAPTIONER, FAILURES, REPORT, CACHE = (
    "summariser.jsonl", "captioner.jsonl", "failures.jsonl", "captioning.json", "cache"
)  # fmt: skip
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif")


def find_clips(path: Path) -> tuple[Clip, ...]:
    """The clips of a list (`shared.clips.dataset.read_clips`), or, without captions, a video file or all
    those of a folder. Clips that are not there are told as failures, one by one."""
    if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
        return (_bare(0, path, path.parent),)
    if path.is_dir() and not any((path / name).exists() for name in (METADATA, VIDEOS, "labels")):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES)
        if not files:
            raise SettingError(f"{path} has neither a list of clips nor files {', '.join(VIDEO_SUFFIXES)}")
        return tuple(_bare(number, file, path) for number, file in enumerate(files))
    return read_clips(path, must_exist=False)


def _bare(number: int, file: Path, folder: Path) -> Clip:
    return Clip(number=number, name=file.relative_to(folder).as_posix(), video=file, caption="")


def check_folder(folder: Path, source: Path, *, overwrite: bool) -> None:
    """OutputPathError where the new list would be among those of `source`, or replace one that no earlier run
    wrote: a run that is repeated goes on, but nobody's own captions are lost."""
    if folder.resolve() == folder_of(source).resolve():
        raise OutputPathError(f"{folder} holds the clips' own list; choose another folder for the new one")
    if folder.exists() and not folder.is_dir():
        raise OutputPathError(f"{folder} is a file; captions need a folder")
    if (folder / METADATA).exists() and not (folder / REPORT).exists() and not overwrite:
        raise OutputPathError(
            f"{folder / METADATA} is another list; choose another folder or pass --overwrite"
        )


def write_outputs(
    outcomes: Sequence[Outcome], folder: Path, report: Mapping[str, Any], *, end_to_end_prompt: str
) -> None:
    """`metadata.jsonl` of the captioned clips (paths relative to `folder`), `captioner.jsonl` (video and
    prompt -> caption), `summariser.jsonl` (short and frame captions -> summary) and `failures.jsonl`, each of
    these three only where it has lines; then `captioning.json`, the report."""
    named = [(o.clip, o.captions, _relative(o.clip.video, folder)) for o in outcomes if o.captions]
    staged = [captions for _, captions, _ in named if captions.dense]
    failed = [{"video": o.clip.name, "reason": str(o.error)} for o in outcomes if o.error]
    pairs = [(name, captions.text) for _, captions, name in named]
    _write_lines(folder / METADATA, [_row(*item) for item in named], keep_empty=True)
    _write_lines(folder / SUMMARISER, [summariser_row(captions) for captions in staged])
    _write_lines(folder / CAPTIONER, [captioner_row(name, end_to_end_prompt, text) for name, text in pairs])
    _write_lines(folder / FAILURES, failed)
    write_json(folder / REPORT, report)


def summariser_row(captions: ClipCaptions) -> dict[str, Any]:
    """An example for a distilled summariser: the question that the large one was asked, and its answer."""
    question = [
        {"role": message.role, "content": message.text}
        for message in summary_messages(captions.short, captions.dense)
    ]
    return {"messages": [*question, {"role": "assistant", "content": captions.text}]}


def captioner_row(video: str, prompt: str, text: str) -> dict[str, Any]:
    """An example for an end-to-end captioner."""
    content = [{"type": "video", "video": video}, {"type": "text", "text": prompt}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": text}]}


def _row(clip: Clip, captions: ClipCaptions, name: str) -> dict[str, Any]:
    """A line of the new list; what the list said before stays, its caption as "original_caption"."""
    original = {"original_caption": clip.caption} if clip.caption else {}
    frames = [{"time": caption.time, "text": caption.text} for caption in captions.dense]
    staged = {"short_caption": captions.short, "frame_captions": frames} if frames else {}
    head = {VIDEO_FIELDS[0]: name, CAPTION_FIELDS[0]: captions.text}
    return head | original | dict(clip.fields) | staged


def _relative(video: Path, folder: Path) -> str:
    return Path(os.path.relpath(video.absolute(), folder.absolute())).as_posix()


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]], *, keep_empty: bool = False) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not text and not keep_empty:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
