"""Captions for clips, stage by stage. Source: CogVideoX (arXiv 2408.06072), section 3.3 and appendix.

video -> short caption
      -> a frame every 2 seconds -> dense caption of each
      -> summary of all these: the clip's caption, and an example for a summariser of one's own.
Or the end-to-end path: video -> caption.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from shared.captioning.cache import CaptionCache
from shared.captioning.errors import CaptionError, RefusedError, StoppedError
from shared.captioning.frames import LEAST_SECONDS, frames_every
from shared.captioning.instructions import END_TO_END
from shared.captioning.protocols import (
    DenseCaptioner,
    EndToEndCaptioner,
    ShortCaptioner,
    Summariser,
    TimedCaption,
)
from shared.captioning.retrying import Stop
from shared.clips.dataset import Clip, content_key, probe
from shared.errors import OutputPathError, SettingError, UserError
from shared.runtime import check_workers
from shared.video import Video
from shared.video_io import read_video


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Seconds between the frames that are described, and the seconds of a clip that are looked at: they are
    decoded into memory, once for each clip that something is still to be asked about."""

    every: float = 2.0
    max_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("every", "max_seconds"):
            if not getattr(self, name) >= LEAST_SECONDS:
                raise SettingError(
                    f"{name} must be at least {LEAST_SECONDS} seconds, got {getattr(self, name):g}"
                )


@dataclass(frozen=True, kw_only=True)
class ClipCaptions:
    """What was said of a clip; `short` and `dense` stay empty on the end-to-end path."""

    text: str
    short: str = ""
    dense: tuple[TimedCaption, ...] = ()


class Describer(Protocol):
    def describe(self, clip: Clip) -> ClipCaptions: ...


class _Decoded:
    """The clip's frames, decoded when they are first needed."""

    def __init__(self, path: Path, max_seconds: float) -> None:
        self._path, self._max_seconds = path, max_seconds
        self._video: Video | None = None

    @property
    def video(self) -> Video:
        if self._video is None:
            limit = max(1, math.ceil(probe(self._path).fps * self._max_seconds))
            self._video = read_video(self._path, max_frames=limit)
        return self._video


@dataclass(frozen=True, kw_only=True)
class DensePipeline:
    """The staged path. `short` None: the clip's own caption stands for it."""

    short: ShortCaptioner | None
    dense: DenseCaptioner
    summariser: Summariser
    cache: CaptionCache
    settings: ClipSettings = field(default_factory=ClipSettings)

    def describe(self, clip: Clip) -> ClipCaptions:
        """UserError where the clip cannot be read, CaptionError where a stage has no answer; the answers
        before are kept."""
        content = content_key(clip.video)
        decoded = _Decoded(clip.video, self.settings.max_seconds)
        with self.cache.alone(content):
            short = self._short(clip, content, decoded)
            dense = tuple(
                TimedCaption(time=time, text=self._dense(content, frame, decoded))
                for time, frame in self._frames(content, decoded)
            )
            return ClipCaptions(text=self._summary(content, short, dense), short=short, dense=dense)

    def _short(self, clip: Clip, content: str, decoded: _Decoded) -> str:
        if (captioner := self.short) is None:
            if not clip.caption:
                raise CaptionError(f"{clip.name} has no caption that could stand for the short one")
            return clip.caption
        inputs = {"max_seconds": self.settings.max_seconds}
        recipe = captioner.recipe("short")
        return self.cache.answer(content, "short", recipe, inputs, lambda: captioner.short(decoded.video))

    def _frames(self, content: str, decoded: _Decoded) -> list[tuple[float, int]]:
        """Kept as well, since the number of frames is only known after decoding."""

        def choose() -> str:
            video = decoded.video
            return json.dumps(frames_every(video.num_frames, video.fps, self.settings.every))

        inputs = {"every": self.settings.every, "max_seconds": self.settings.max_seconds}
        return json.loads(self.cache.answer(content, "frames", {}, inputs, choose, counted=False))

    def _dense(self, content: str, frame: int, decoded: _Decoded) -> str:
        return self.cache.answer(
            content, "dense", self.dense.recipe("dense"), {"frame": frame},
            lambda: self.dense.dense(decoded.video.frames[frame]),
        )  # fmt: skip

    def _summary(self, content: str, short: str, dense: Sequence[TimedCaption]) -> str:
        inputs = {"short": short, "captions": [[caption.time, caption.text] for caption in dense]}
        return self.cache.answer(
            content, "summary", self.summariser.recipe("summary"), inputs,
            lambda: self.summariser.summarise(short, dense),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """The path of one model that sees the video."""

    captioner: EndToEndCaptioner
    cache: CaptionCache
    prompt: str = END_TO_END
    settings: ClipSettings = field(default_factory=ClipSettings)

    def describe(self, clip: Clip) -> ClipCaptions:
        """As `DensePipeline.describe`."""
        content = content_key(clip.video)
        decoded = _Decoded(clip.video, self.settings.max_seconds)
        inputs = {"prompt": self.prompt, "max_seconds": self.settings.max_seconds}
        recipe = self.captioner.recipe("end_to_end")
        with self.cache.alone(content):
            text = self.cache.answer(
                content, "end_to_end", recipe, inputs,
                lambda: self.captioner.end_to_end(decoded.video, self.prompt),
            )  # fmt: skip
        return ClipCaptions(text=text)


# ---- many clips


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A clip with its captions, or with the error that kept it from having any."""

    clip: Clip
    captions: ClipCaptions | None = None
    error: UserError | None = None


def caption_all(
    clips: Sequence[Clip], describer: Describer, *, stop: Stop, num_workers: int = 1, max_failures: int = 10
) -> Iterator[Outcome]:
    """Outcomes in the order of the clips, `num_workers` of which are in work at a time.

    A clip that fails does not end the run; `max_failures` in a row without an answer do (CaptionError), and
    so does a refusal (RefusedError). On any end `stop` is set: threads finish the question they have asked,
    keep its answer, and ask no more.
    """
    check_workers(num_workers)
    if num_workers < 1 or max_failures < 1:
        raise SettingError(
            f"num_workers and max_failures must be at least 1, got {num_workers} and {max_failures}"
        )
    work = _Work(describer, stop)
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="caption")
    try:
        in_a_row = 0
        for outcome in _in_order(executor, work.outcome, clips, 2 * num_workers):
            in_a_row = in_a_row + 1 if isinstance(outcome.error, CaptionError) else 0
            if in_a_row >= max_failures:
                raise CaptionError(f"{in_a_row} clips in a row have no captions; the last: {outcome.error}")
            yield outcome
    except StoppedError:
        raise work.refusal or StoppedError("the run was stopped") from None
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


class _Work:
    """What a thread does; remembers why it made the others stop."""

    def __init__(self, describer: Describer, stop: Stop) -> None:
        self._describer, self._stop = describer, stop
        self.refusal: RefusedError | None = None

    def outcome(self, clip: Clip) -> Outcome:
        self._stop.sleep(0)
        try:
            return Outcome(clip=clip, captions=self._describer.describe(clip))
        except RefusedError as error:
            self.refusal = error
            self._stop.set()
            raise
        except (StoppedError, SettingError, OutputPathError):
            raise
        except UserError as error:
            return Outcome(clip=clip, error=error)


def _in_order(
    executor: ThreadPoolExecutor, work: Callable[[Clip], Outcome], clips: Sequence[Clip], ahead: int
) -> Iterator[Outcome]:
    """Results in order, with at most `ahead` clips handed out."""
    left = iter(clips)
    waiting: deque[Future[Outcome]] = deque(executor.submit(work, clip) for clip in islice(left, ahead))
    while waiting:
        outcome = waiting.popleft().result()
        waiting.extend(executor.submit(work, clip) for clip in islice(left, 1))
        yield outcome
