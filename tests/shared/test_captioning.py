"""Captions stage by stage: which frames, what is asked, what is kept, and in which order."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.captioning import instructions, outputs
from shared.captioning.cache import CaptionCache
from shared.captioning.chat import ChatCaptioner, ChatSettings
from shared.captioning.errors import CaptionError, RefusedError
from shared.captioning.frames import frames_at_seconds, frames_every, frames_spread
from shared.captioning.instructions import Message
from shared.captioning.pipeline import ClipSettings, DensePipeline, EndToEnd, Outcome, caption_all
from shared.captioning.protocols import Recipe, Stage, TimedCaption
from shared.captioning.retrying import Stop
from shared.captioning.shapes_adapter import ShapesCaptioner
from shared.clips import shapes
from shared.clips.dataset import Clip, read_clips
from shared.errors import OutputPathError, SettingError
from shared.video import Video
from shared.video_io import read_video
from tests.shared.clip_files import scenes, write_clips, write_metadata


class Stub:
    """Says what it was asked; `failing` maps the number of a call to the error that it raises."""

    def __init__(self, name: str = "stub", failing: dict[int, Exception] | None = None) -> None:
        self.name, self.failing = name, failing or {}
        self.calls: list[str] = []
        self._lock = threading.Lock()

    def recipe(self, stage: Stage) -> Recipe:
        return {"name": self.name}

    def short(self, video: Video) -> str:
        return self._said(f"short of {video.num_frames} frames")

    def dense(self, image: Tensor) -> str:
        return self._said(f"dense {image.float().mean():.3f}")

    def summarise(self, short: str, captions: Sequence[TimedCaption]) -> str:
        return self._said(f"{short}; " + "; ".join(f"{c.time:g}: {c.text}" for c in captions))

    def end_to_end(self, video: Video, prompt: str) -> str:
        return self._said(f"{prompt} {video.num_frames} {video.frames.float().mean():.3f}")

    def _said(self, text: str) -> str:
        with self._lock:
            self.calls.append(text)
            error = self.failing.get(len(self.calls) - 1)
        if error:
            raise error
        return text


@pytest.fixture
def clips(tmp_path: Path) -> tuple[Clip, ...]:
    """Five, the last the same as the first."""
    captions = write_clips(tmp_path, 4)
    (tmp_path / "videos/4.mkv").write_bytes((tmp_path / "videos/0.mkv").read_bytes())
    rows = {f"videos/{i}.mkv": caption for i, caption in enumerate([*captions, captions[0]])}
    write_metadata(tmp_path, rows)
    return read_clips(tmp_path)


def staged(stub: Stub, cache: CaptionCache, **settings: Any) -> DensePipeline:
    return DensePipeline(
        short=stub, dense=stub, summariser=stub, cache=cache, settings=ClipSettings(**settings)
    )


def run(clips: Sequence[Clip], describer: Any, **options: Any) -> list[Outcome]:
    return list(caption_all(clips, describer, stop=Stop(), **options))


def texts(outcomes: Sequence[Outcome]) -> list[str]:
    assert all(outcome.captions for outcome in outcomes), [outcome.error for outcome in outcomes]
    return [outcome.captions.text for outcome in outcomes if outcome.captions]


# ---- frames


def test_a_frame_every_two_seconds() -> None:
    assert frames_every(50, 8.0) == [(0.0, 0), (2.0, 16), (4.0, 32), (6.0, 48)]
    assert frames_every(48, 8.0) == [(0.0, 0), (2.0, 16), (4.0, 32)], "at 6 s there is no frame any more"
    assert frames_every(1, 30.0) == [(0.0, 0)]
    assert frames_every(180, 29.97) == [(0.0, 0), (2.0, 59), (4.0, 119), (6.0, 179)]
    assert frames_every(9, 8.0, 0.5) == [(0.0, 0), (0.5, 4), (1.0, 8)]
    with pytest.raises(SettingError, match=r"every must be at least 0\.001 seconds, got 0"):
        frames_every(9, 8.0, 0)


def test_the_frames_of_an_end_to_end_captioner() -> None:
    assert frames_at_seconds(49, 8.0) == [0, 8, 16, 24, 32, 40, 48]
    assert frames_at_seconds(45, 8.0) == [0, 8, 16, 24, 32, 40, 44], (
        "5.5 s is rounded up, the nearest is last"
    )
    assert frames_at_seconds(44, 8.0)[-1] == 40
    assert frames_at_seconds(3000, 10.0) == list(range(0, 240, 10))
    assert frames_spread(49, 8.0, 4) == [0, 16, 32, 48] and frames_spread(3, 8.0) == [0, 1, 2]
    assert frames_spread(9000, 10.0)[-1] == 599 and len(frames_spread(9000, 10.0)) == 24
    assert frames_spread(7, 8.0, 1) == [0]


# ---- one clip


def test_stages_in_their_order(clips: tuple[Clip, ...], tmp_path: Path) -> None:
    stub = Stub()
    captions = staged(stub, CaptionCache(tmp_path / "kept")).describe(clips[0])
    frames = read_video(clips[0].video).frames.float()
    dense = [f"dense {frames[i].mean():.3f}" for i in (0, 16)]
    assert stub.calls == ["short of 17 frames", *dense, captions.text]
    assert captions.dense == tuple(TimedCaption(time=t, text=d) for t, d in zip((0, 2), dense, strict=True))
    assert captions.text == f"{captions.short}; 0: {dense[0]}; 2: {dense[1]}"


def test_the_given_caption_may_be_the_short_one(clips: tuple[Clip, ...], tmp_path: Path) -> None:
    stub = Stub()
    path = DensePipeline(short=None, dense=stub, summariser=stub, cache=CaptionCache(tmp_path / "kept"))
    assert path.describe(clips[0]).short == clips[0].caption and len(stub.calls) == 3
    bare = Clip(number=0, name="a", video=clips[0].video, caption="")
    with pytest.raises(CaptionError, match="a has no caption"):
        path.describe(bare)


def test_only_the_beginning_is_looked_at(clips: tuple[Clip, ...], tmp_path: Path) -> None:
    stub = Stub()
    cache = CaptionCache(tmp_path / "kept")
    captions = staged(stub, cache, max_seconds=1.0, every=0.5).describe(clips[0])
    assert captions.short == "short of 8 frames" and [c.time for c in captions.dense] == [0, 0.5]


def test_the_oracle_tells_the_demo_world(tmp_path: Path) -> None:
    cache, oracle = CaptionCache(tmp_path / "kept"), ShapesCaptioner()
    write_clips(tmp_path, 3)
    for i, scene in enumerate(scenes(3)):
        clip = Clip(number=i, name=str(i), video=tmp_path / f"videos/{i}.mkv", caption="")
        path = DensePipeline(short=oracle, dense=oracle, summariser=oracle, cache=cache)
        captions = path.describe(clip)
        assert captions.short == scene.caption.text
        assert shapes.parse(captions.text) == scene.caption.attributes()
        assert [c.text.lower() for c in captions.dense] == [f"{scene.caption.image_text}."] * 2
        whole = EndToEnd(captioner=oracle, cache=cache).describe(clip).text
        assert shapes.parse(whole) == scene.caption.attributes()
    noise = torch.randint(256, (17, 64, 64, 3)).to(torch.uint8)
    with pytest.raises(CaptionError, match="none of its shapes"):
        oracle.short(Video(frames=noise, fps=8.0))


# ---- what a chat model is asked


class Recorder:
    def __init__(self) -> None:
        self.recipe: Recipe = {"model": "recorder"}
        self.asked: list[list[Message]] = []

    def answer(self, messages: Sequence[Message]) -> str:
        self.asked.append(list(messages))
        return "said"


def test_what_a_chat_model_is_asked() -> None:
    model = Recorder()
    captioner = ChatCaptioner(model, ChatSettings(short_frames=4, max_frames=2))
    frames = torch.arange(17, dtype=torch.uint8)[:, None, None, None].expand(17, 4, 4, 3)
    video = Video(frames=frames, fps=8.0)
    captioner.short(video)
    captioner.dense(video.frames[3])
    captioner.summarise("a\nball", [TimedCaption(time=0.0, text="x\ny"), TimedCaption(time=2.0, text="z")])
    captioner.end_to_end(video, "tell me")
    captioner.upsample("a ball")
    captioner.upsample("it rolls", video.frames[5])
    shown = [[int(image[0, 0, 0]) for m in messages for image in m.images] for messages in model.asked]
    assert shown == [[2, 6, 10, 14], [3], [], [0, 8], [], [5]]
    assert model.asked[2][1].text == "Short caption: a ball\nFrame at 0 s: x y\nFrame at 2 s: z"
    roles = [[m.role for m in messages] for messages in model.asked]
    assert roles == [["user"], ["user"], ["system", "user"], ["user"], ["system", "user"], ["system", "user"]]
    assert model.asked[3][0].text == "tell me"
    assert [m[0].text for m in model.asked[4:]] == [instructions.UPSAMPLE, instructions.UPSAMPLE_IMAGE]


def test_recipes_differ_where_answers_would() -> None:
    one, other = (ChatCaptioner(Recorder(), ChatSettings(short_frames=n)) for n in (2, 3))
    stages: tuple[Stage, ...] = ("short", "dense", "summary", "end_to_end", "upsample")
    assert one.recipe("short") != other.recipe("short") and one.recipe("dense") == other.recipe("dense")
    assert len({json.dumps(one.recipe(stage), sort_keys=True) for stage in stages}) == 5
    with pytest.raises(SettingError, match="max_frames must be at least 1"):
        ChatSettings(max_frames=0)


# ---- what is kept


def test_nothing_is_asked_twice(clips: tuple[Clip, ...], tmp_path: Path) -> None:
    stub, cache = Stub(), CaptionCache(tmp_path / "kept")
    first = texts(run(clips, staged(stub, cache)))
    assert len(stub.calls) == 16, "four stages of four clips; the fifth is a copy of the first"
    assert (cache.num_asked, cache.num_kept) == (16, 4) and first[0] == first[4]
    again, cache = Stub(), CaptionCache(tmp_path / "kept")
    for clip in clips[:4]:
        renamed = clip.video.rename(clip.video.with_name(f"other-{clip.video.name}"))
        renamed.rename(clip.video)
    assert texts(run(clips, staged(again, cache))) == first and not again.calls and cache.num_asked == 0


def test_copies_worked_on_at_once_are_asked_about_once(clips: tuple[Clip, ...], tmp_path: Path) -> None:
    class Slow(Stub):
        def short(self, video: Video) -> str:
            time.sleep(0.2)
            return super().short(video)

    stub = Slow()
    first, copy = texts(
        run([clips[0], clips[4]], staged(stub, CaptionCache(tmp_path / "kept")), num_workers=2)
    )
    assert first == copy and len(stub.calls) == 4


def test_a_changed_setting_asks_what_depends_on_it(clips: tuple[Clip, ...], tmp_path: Path) -> None:
    run(clips[:1], staged(Stub(), CaptionCache(tmp_path / "kept")))
    stub = Stub()
    run(clips[:1], staged(stub, CaptionCache(tmp_path / "kept"), every=1.0))
    assert [call.split()[0] for call in stub.calls] == ["dense", "short"], "the frame at 1 s, and the summary"
    other = Stub("other")
    mixed = DensePipeline(short=stub, dense=stub, summariser=other, cache=CaptionCache(tmp_path / "kept"))
    assert len(texts(run(clips[:1], mixed))) == 1 and len(other.calls) == 1 and len(stub.calls) == 2


def test_half_a_line_is_passed_over(tmp_path: Path) -> None:
    cache = CaptionCache(tmp_path)
    asked: list[str] = []

    def ask(text: str) -> str:
        return cache.answer("abcd", "dense", {}, {"frame": text}, lambda: asked.append(text) or text)

    ask("a")
    ask("b\nü")
    path = tmp_path / "ab" / "abcd.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert [ask("a"), ask("b\nü"), ask("a"), ask("b\nü")] == ["a", "b\nü"] * 2
    assert asked == ["a", "b\nü", "b\nü"] and path.read_bytes().endswith(whole.splitlines()[1] + b"\n")


def test_a_failed_answer_is_not_kept(clips: tuple[Clip, ...], tmp_path: Path) -> None:
    stub = Stub(failing={2: CaptionError("no")})
    (outcome,) = run(clips[:1], staged(stub, CaptionCache(tmp_path / "kept")))
    assert str(outcome.error) == "no" and outcome.captions is None
    calls = len(stub.calls)
    assert len(texts(run(clips[:1], staged(stub, CaptionCache(tmp_path / "kept"))))) == 1
    assert len(stub.calls) == calls + 2, "the frame that failed, and the summary"


def test_a_cache_that_cannot_be_written_ends_the_run(clips: tuple[Clip, ...], tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(OutputPathError, match="cannot"):
        run(clips, staged(Stub(), CaptionCache(tmp_path / "kept")))


# ---- many clips


@pytest.mark.parametrize("num_workers", [1, 4])
def test_order_does_not_depend_on_threads(clips: tuple[Clip, ...], tmp_path: Path, num_workers: int) -> None:
    class Slow(Stub):
        def dense(self, image: Tensor) -> str:
            time.sleep(0.03 * (len(self.calls) == 1))  # the first clip is done last
            return super().dense(image)

    outcomes = run(clips, staged(Slow(), CaptionCache(tmp_path / "kept")), num_workers=num_workers)
    assert [outcome.clip for outcome in outcomes] == list(clips)
    assert texts(outcomes) == texts(run(clips, staged(Stub(), CaptionCache(tmp_path / "other"))))


def test_clips_that_fail_do_not_end_the_run(clips: tuple[Clip, ...], tmp_path: Path) -> None:
    clips[1].video.write_bytes(b"no video")
    clips[2].video.unlink()
    outcomes = run(clips, staged(Stub(), CaptionCache(tmp_path / "kept")), num_workers=2, max_failures=1)
    assert [bool(outcome.captions) for outcome in outcomes] == [True, False, False, True, True]
    assert "cannot read" in str(outcomes[1].error) and "2.mkv" in str(outcomes[2].error)


def test_too_many_failures_in_a_row_end_the_run(clips: tuple[Clip, ...], tmp_path: Path) -> None:
    stub = Stub(failing=dict.fromkeys(range(99), CaptionError("down")))
    with pytest.raises(CaptionError, match="2 clips in a row have no captions; the last: down"):
        run(clips, staged(stub, CaptionCache(tmp_path / "kept")), max_failures=2)
    assert len(stub.calls) < 5
    for wrong in ({"num_workers": 0}, {"max_failures": 0}):
        with pytest.raises(SettingError, match="must be at least 1"):
            run(clips, staged(stub, CaptionCache(tmp_path / "kept")), **wrong)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_refusal_ends_the_run(clips: tuple[Clip, ...], tmp_path: Path, num_workers: int) -> None:
    stub = Stub(failing={1: RefusedError("wrong key")})
    many = [clips[i % 4] for i in range(40)]
    with pytest.raises(RefusedError, match="wrong key"):
        run(many, staged(stub, CaptionCache(tmp_path / "kept")), num_workers=num_workers)
    assert len(stub.calls) <= 4 * num_workers


# ---- files


def test_examples_for_training(clips: tuple[Clip, ...], tmp_path: Path) -> None:
    outcomes = run(clips[:2], staged(Stub(), CaptionCache(tmp_path / "kept")))
    outcomes.append(Outcome(clip=clips[2], error=CaptionError("no")))
    folder = tmp_path / "new" / "list"
    outputs.write_outputs(outcomes, folder, {"ok": False}, end_to_end_prompt="tell")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    made = [outcome.captions for outcome in outcomes if outcome.captions]
    assert [row["caption"] for row in rows] == [captions.text for captions in made]
    assert [row["original_caption"] for row in rows] == [clip.caption for clip in clips[:2]]
    assert rows[0]["frame_captions"][1] == {"time": 2.0, "text": made[0].dense[1].text}
    assert [clip.video.resolve() for clip in read_clips(folder)] == [clip.video for clip in clips[:2]]
    chats = [json.loads(line)["messages"] for line in (folder / "summariser.jsonl").read_text().splitlines()]
    asked = instructions.summary_messages(made[0].short, made[0].dense)
    assert [turn["role"] for turn in chats[0]] == ["system", "user", "assistant"]
    assert [turn["content"] for turn in chats[0]] == [*(m.text for m in asked), made[0].text]
    pairs = [json.loads(line)["messages"] for line in (folder / "captioner.jsonl").read_text().splitlines()]
    video, words = pairs[0][0]["content"]
    assert (folder / video["video"]).samefile(clips[0].video) and words == {"type": "text", "text": "tell"}
    assert pairs[0][1] == {"role": "assistant", "content": made[0].text}
    failures = (folder / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in failures] == [{"video": "videos/2.mkv", "reason": "no"}]
    outputs.write_outputs(outcomes[:2], folder, {"ok": True}, end_to_end_prompt="tell")
    assert not (folder / "failures.jsonl").exists()


def test_clips_without_a_list(tmp_path: Path) -> None:
    write_clips(tmp_path / "films", 2)
    found = outputs.find_clips(tmp_path / "films")
    assert [(clip.name, clip.caption) for clip in found] == [("videos/0.mkv", ""), ("videos/1.mkv", "")]
    assert outputs.find_clips(found[1].video)[0].video == found[1].video
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match="neither a list of clips nor files"):
        outputs.find_clips(tmp_path / "empty")
