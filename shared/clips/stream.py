"""Batches of samples as a function of (seed, step): by how many processes they are read makes no difference.

A batch of a step is dealt out to the data parallel ranks, so that no sample is seen twice in an epoch. All of
its samples belong to one group (say, one size), on every rank the same. Worker processes read ahead.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from shared.clips.buckets import Bucket, assign
from shared.clips.dataset import Clip, Extent, even_count, even_indices, probe, read_clips, read_frames
from shared.clips.workers import items_of
from shared.errors import BatchError, SettingError, UserError
from shared.transforms import fit_video

Tails = Literal["drop", "keep", "fill"]
_Read = tuple[int, dict[str, Tensor] | None, str]  # number, sample, why there is none


class Samples(Protocol):
    """What can be read by number; UserError for a sample that cannot."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class BatchPlan:
    """Which samples a step reads. `groups` has an entry per sample; `batch_size` is that of one rank.

    Every epoch draws a new order from (seed, epoch) alone. What does not fill a batch of all ranks waits for
    another epoch's luck ("drop"), makes a smaller batch ("keep", for one rank), or is filled up with samples
    of its group that come twice ("fill"). SettingError where a group would never be seen.
    """

    groups: Sequence[Hashable]
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    tails: Tails = "drop"
    _last: dict[int, list[list[int]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.rank < self.world_size or self.seed < 0:
            raise SettingError(
                f"batch_size must be at least 1, rank in 0..{self.world_size - 1} and seed not negative, "
                f"got {self.batch_size}, {self.rank} and {self.seed}"
            )
        if self.tails == "keep" and self.world_size > 1:
            raise SettingError("smaller batches at the end of an epoch (tails='keep') are for one rank only")
        small = [g for g, places in self._members.items() if len(places) < self._whole]
        if not self.groups or (small and self.tails == "drop"):
            named = f"; {small[0]} has {len(self._members[small[0]])}" if small else ""
            raise SettingError(f"every group needs {self._whole} samples for a batch of all ranks{named}")

    @property
    def steps_per_epoch(self) -> int:
        whole, drop = self._whole, self.tails == "drop"
        return sum(
            len(places) // whole if drop else -(-len(places) // whole) for places in self._members.values()
        )

    def batch(self, step: int) -> list[int]:
        """This rank's samples of a step, which may be any number from 0 on."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[place][self.rank :: self.world_size]

    @property
    def _whole(self) -> int:
        return self.batch_size * self.world_size

    @cached_property
    def _members(self) -> dict[Hashable, list[int]]:
        members: dict[Hashable, list[int]] = {}
        for place, group in enumerate(self.groups):
            members.setdefault(group, []).append(place)
        return members

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Batches of all ranks together, in their order; the last epoch asked for is kept."""
        if epoch not in self._last:
            rng = np.random.default_rng([self.seed, epoch])
            batches = []
            for places in self._members.values():
                mixed = [places[i] for i in rng.permutation(len(places))]
                if self.tails == "fill":
                    mixed = list(islice(cycle(mixed), -(-len(mixed) // self._whole) * self._whole))
                cut = [mixed[i : i + self._whole] for i in range(0, len(mixed), self._whole)]
                batches += [b for b in cut if self.tails == "keep" or len(b) == self._whole]
            self._last.clear()
            self._last[epoch] = [batches[i] for i in rng.permutation(len(batches))]
        return self._last[epoch]


class Plan(Protocol):
    """Which samples a step reads, whatever was read before."""

    def batch(self, step: int) -> list[int]: ...


@dataclass(kw_only=True)
class ClipStream:
    """Batches from `start_step` on, without end: pairs of the step and tensors stacked over the samples.

    A sample that cannot be read is replaced by the next one of its batch, so that batches keep their size;
    `skipped` tells its number and why. BatchError where a whole batch cannot be read. One of several
    processes that share out the steps reads every `stride`-th; worker processes read ahead in that order.
    """

    samples: Samples
    plan: Plan
    start_step: int = 0
    stride: int = 1
    num_workers: int = 0
    skipped: dict[int, str] = field(default_factory=dict)
    _ahead: Iterator[list[_Read]] | None = field(default=None, init=False, repr=False)
    _next: int = field(default=-1, init=False, repr=False)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for step in count(self.start_step, self.stride):
            yield step, self.at(step)

    def at(self, step: int) -> dict[str, Tensor]:
        """The batch of any step; quickest where steps are asked for in their order."""
        read = self._read(step)
        good = self._good(step, read)
        return stacked(_replaced([sample for _, sample, _ in read], good))

    def rows_at(self, step: int) -> list[tuple[int, dict[str, Tensor]]]:
        """As `at`, not stacked and with their numbers, so that sizes may differ; nothing stands in for what
        cannot be read."""
        read = self._read(step)
        self._good(step, read)
        return [(place, sample) for place, sample, _ in read if sample is not None]

    def _read(self, step: int) -> list[_Read]:
        if self._ahead is None or step != self._next:
            loader = DataLoader(
                _Readable(self.samples),
                batch_sampler=_Steps(self.plan, step, self.stride),
                num_workers=self.num_workers,
                collate_fn=list,
                generator=torch.Generator(),  # else the loader draws from the state that training uses
            )
            self._ahead = items_of(loader)
        self._next = -1  # a loader that failed is not asked again
        read = next(self._ahead)
        self._next = step + self.stride
        return read

    def _good(self, step: int, read: list[_Read]) -> list[dict[str, Tensor]]:
        self.skipped |= {place: reason for place, sample, reason in read if sample is None}
        good = [sample for _, sample, _ in read if sample is not None]
        if not good:
            raise BatchError(f"no sample of step {step} can be read: {read[0][2]}")
        return good


class PixelClips:
    """Clips decoded when they are asked for: "pixels" float32 [3, T, H, W] in -1..1, frames at even times.

    `groups` are the sizes; `left_out` tells the numbers of clips that do not suit, and why. SettingError
    where none does."""

    def __init__(self, clips: Sequence[Clip], buckets: Sequence[Bucket], fps: float) -> None:
        self.fps, self.left_out = fps, dict[int, str]()
        self._chosen: list[tuple[Clip, Extent, Bucket]] = []
        for clip in clips:
            try:
                extent = probe(clip.video)
                count = even_count(extent.num_frames, extent.fps, fps)
                bucket = assign(count, extent.height, extent.width, buckets)
                self._chosen.append((clip, extent, bucket))
            except UserError as error:
                self.left_out[clip.number] = str(error)
        if not self._chosen:
            reason = next(iter(self.left_out.values()), "the list is empty")
            raise SettingError(f"none of {len(clips)} clips can be used: {reason}")
        self.groups = [str(bucket) for _, _, bucket in self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        clip, extent, bucket = self._chosen[place]
        video = read_frames(clip.video, even_indices(extent.fps, self.fps, bucket.num_frames), self.fps)
        return {"pixels": fit_video(video, bucket.height, bucket.width).to_pixels()}


class PixelBatches:
    """Pixels of the clips on a list, for the training of a codec: frames at even times from the first on,
    decoded when their turn comes. Clips that cannot be read are passed over; SettingError where none is
    left."""

    def __init__(
        self, path: Path, size: tuple[int, int], fps: float, *, stride: int = 1, num_workers: int = 0
    ) -> None:
        self._clips, self._size, self._fps = read_clips(path, must_exist=False), size, fps
        self._stride, self._num_workers = stride, num_workers
        self._last: tuple[tuple[int, int, int], ClipStream] | None = None

    def batch(self, seed: int, step: int, size: int, num_frames: int) -> Tensor:
        """float32 [size, 3, num_frames, height, width] in -1..1."""
        asked = (seed, size, num_frames)
        if self._last is None or self._last[0] != asked:
            height, width = self._size
            bucket = Bucket(num_frames=num_frames, height=height, width=width)
            samples = PixelClips(self._clips, (bucket,), self._fps)
            plan = BatchPlan(samples.groups, size, seed=seed, tails="fill")
            stream = ClipStream(
                samples=samples, plan=plan, stride=self._stride, num_workers=self._num_workers
            )
            self._last = asked, stream
        return self._last[1].at(step)["pixels"]


def stacked(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the samples along a new first axis."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _replaced(samples: Sequence[dict[str, Tensor] | None], good: Sequence[dict[str, Tensor]]) -> list[Any]:
    """Every hole takes the next sample that is there, round the end."""
    result: list[Any] = list(samples)
    for place in reversed(range(len(result))):
        if result[place] is None:
            result[place] = result[place + 1] if place + 1 < len(result) else good[0]
    return result


class _Steps(Sampler[list[int]]):
    """The plan as a loader reads it."""

    def __init__(self, plan: Plan, start: int, stride: int) -> None:
        self.plan, self.start, self.stride = plan, start, stride

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.plan.batch, count(self.start, self.stride))


class _Readable(Dataset):
    """(number, sample or None, reason): errors of a file do not end a worker."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> _Read:
        try:
            return place, self.samples[place], ""
        except UserError as error:
            return place, None, str(error)
