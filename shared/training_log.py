"""What a training run says of itself: `log.jsonl`, TensorBoard events, sample videos, a progress bar."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from shared.video import Video

Figures = Mapping[str, float]


class Logbook:
    """To be used in a `with` block. An inactive one (of any process but the main one) takes it all in and
    writes nothing."""

    def __init__(self, folder: Path, *, steps: int, start: int, active: bool, quiet: bool) -> None:
        self.folder, self.active = folder, active
        self._steps, self._start, self._quiet = steps, start, quiet
        self._open = ExitStack()

    def __enter__(self) -> Logbook:
        from torch.utils.tensorboard import SummaryWriter

        self._began = time.monotonic()
        if self.active:
            self._board = self._open.enter_context(SummaryWriter(str(self.folder)))
            path = self.folder / "log.jsonl"
            _cut_to_whole_lines(path)  # a kill or a full disk may have left the beginning of one
            self._log = self._open.enter_context(open(path, "a", encoding="utf-8"))
        hidden = self._quiet or not self.active
        bar = tqdm(total=self._steps, initial=self._start, unit="step", dynamic_ncols=True, disable=hidden)
        self._bar = self._open.enter_context(bar)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def advance(self) -> None:
        self._bar.update()

    def report(self, step: int, figures: Figures, *, show: bool = False) -> None:
        """One line of the log and a point of every curve; `show` also puts them on the bar."""
        if not self.active:
            return
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        line = {"step": step, "elapsed": round(time.monotonic() - self._began, 1), **figures}
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        if show:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})

    def draw(self, step: int, samples: Mapping[str, Video]) -> None:
        """Sample videos: `samples/STEP-NAME.gif`, and their frames side by side in TensorBoard."""
        from shared.video_io import write_video

        for name, video in samples.items() if self.active else ():
            write_video(video, self.folder / "samples" / f"{step:07d}-{name}.gif", overwrite=True)
            strip = video.frames.permute(1, 0, 2, 3).flatten(1, 2)
            self._board.add_image(f"samples/{name}", strip.numpy(), step, dataformats="HWC")


def _cut_to_whole_lines(path: Path) -> None:
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def memory_bytes(device: torch.device) -> int:
    """The most that tensors on a GPU took at once, so far; on a CPU the most that the whole process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # absent on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
