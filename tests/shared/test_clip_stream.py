"""Batches are a function of seed and step, whatever reads them."""

from __future__ import annotations

import os
import signal
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.clips.buckets import parse_buckets
from shared.clips.dataset import read_clips, read_frames
from shared.clips.stream import BatchPlan, ClipStream, PixelClips
from shared.errors import BatchError, SettingError, UserError
from shared.transforms import fit_video
from tests.shared.clip_files import broken_files, world, write_metadata

GROUPS = ["wide"] * 11 + ["high"] * 7


class Numbered:
    """Samples that say their number; those in `bad` cannot be read."""

    def __init__(self, count: int, bad: frozenset[int] = frozenset()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        if place in self.bad:
            raise UserError(f"sample {place} is damaged")
        return {"number": torch.tensor(place), "square": torch.tensor([place, place**2])}


def read(stream: ClipStream, steps: int) -> list[tuple[int, list[int]]]:
    return [(step, batch["number"].tolist()) for step, batch in islice(iter(stream), steps)]


def test_worker_processes_change_nothing() -> None:
    plan = BatchPlan(GROUPS, 2, seed=3)
    alone = read(ClipStream(samples=Numbered(18), plan=plan), 20)
    assert read(ClipStream(samples=Numbered(18), plan=plan, num_workers=2), 20) == alone
    assert alone == [(step, plan.batch(step)) for step in range(20)]
    assert read(ClipStream(samples=Numbered(18), plan=plan, start_step=13), 7) == alone[13:]
    assert alone != read(ClipStream(samples=Numbered(18), plan=BatchPlan(GROUPS, 2, seed=4)), 20)


def test_an_epoch_sees_every_sample_once_and_batches_have_one_group() -> None:
    plan = BatchPlan(GROUPS, 2, seed=1, tails="keep")
    epochs = [[plan.batch(step + start) for step in range(10)] for start in (0, 10)]
    assert plan.steps_per_epoch == 10
    for epoch in epochs:
        assert sorted(chain(*epoch)) == list(range(18))
        assert all(len({GROUPS[i] for i in batch}) == 1 for batch in epoch)
    assert epochs[0] != epochs[1]


def test_a_last_batch_is_filled_up() -> None:
    plan = BatchPlan(GROUPS, 5, seed=1, tails="fill")
    batches = [plan.batch(step) for step in range(5)]
    assert plan.steps_per_epoch == 3 + 2
    assert all(len(batch) == len(set(batch)) == 5 for batch in batches)
    assert {i for batch in batches for i in batch} == set(range(18))
    assert all(len({GROUPS[i] for i in batch}) == 1 for batch in batches)
    few = BatchPlan(["one"] * 2, 5, tails="fill").batch(0)
    assert len(few) == 5 and set(few) == {0, 1}


def test_processes_that_share_out_the_steps_read_every_other_one() -> None:
    """Also when a step is asked for out of its order, as after a resume."""
    plan = BatchPlan(GROUPS, 2, seed=3)
    stream = ClipStream(samples=Numbered(18), plan=plan, start_step=1, stride=2)
    assert read(stream, 3) == [(step, plan.batch(step)) for step in (1, 3, 5)]
    for step in (7, 9, 2, 4, 4):
        assert stream.at(step)["number"].tolist() == plan.batch(step)


def test_ranks_share_a_batch_of_one_group_and_no_sample() -> None:
    plans = [BatchPlan(GROUPS, 2, seed=5, rank=rank, world_size=3) for rank in range(3)]
    assert plans[0].steps_per_epoch == 2  # 1 of 11 // 6 and 1 of 7 // 6
    whole = BatchPlan(GROUPS, 6, seed=5)
    for start in range(0, 10, 2):
        seen: list[int] = []
        for step in (start, start + 1):
            parts = [plan.batch(step) for plan in plans]
            assert all(len(part) == 2 for part in parts)
            assert len({GROUPS[i] for part in parts for i in part}) == 1
            assert sorted(chain(*parts)) == sorted(whole.batch(step))  # as one rank would have read
            seen += chain(*parts)
        assert len(seen) == len(set(seen))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_samples_are_replaced_and_told(num_workers: int) -> None:
    plan = BatchPlan(["one"] * 9, 3, seed=2)
    bad = frozenset({plan.batch(0)[1], plan.batch(1)[2], plan.batch(1)[0]})
    stream = ClipStream(samples=Numbered(9, bad), plan=plan, num_workers=num_workers)
    (_, first), (_, second) = read(stream, 2)
    one, other = plan.batch(0), plan.batch(1)
    assert first == [one[0], one[2], one[2]]
    assert second == [other[1]] * 3
    assert bad <= stream.skipped.keys() and stream.skipped[one[1]] == f"sample {one[1]} is damaged"
    with pytest.raises(BatchError, match="no sample of step 0 can be read"):
        read(ClipStream(samples=Numbered(9, frozenset(range(9))), plan=plan), 1)


class Mortal(Numbered):
    """Whoever reads it dies."""

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(place)


def test_a_dead_worker_is_told_as_often_as_it_is_asked_for() -> None:
    stream = ClipStream(samples=Mortal(4), plan=BatchPlan(["one"] * 4, 2), num_workers=1)
    for step in (0, 0, 1):
        with pytest.raises(UserError, match=r"DataLoader worker .* fewer --num_workers"):
            stream.at(step)


def test_plans_that_would_never_see_a_sample_are_refused() -> None:
    with pytest.raises(SettingError, match=r"every group needs 8 samples .*; high has 7"):
        BatchPlan(GROUPS, 4, world_size=2)
    with pytest.raises(SettingError, match="for one rank only"):
        BatchPlan(GROUPS, 2, world_size=2, tails="keep")
    with pytest.raises(SettingError, match=r"rank in 0\.\.1"):
        BatchPlan(GROUPS, 2, rank=2, world_size=2)
    with pytest.raises(SettingError, match="every group needs 2 samples"):
        BatchPlan([], 2)


def test_clips_are_decoded_on_the_way_and_damaged_ones_told(tmp_path: Path) -> None:
    world(tmp_path, 4)
    broken = broken_files(tmp_path)
    write_metadata(tmp_path, dict.fromkeys([f"videos/{i}.mkv" for i in range(4)] + broken, "words"))
    clips = read_clips(tmp_path)
    samples = PixelClips(clips, parse_buckets(["5x32x32", "17x48x48"]), 4.0)
    assert samples.left_out.keys() == {5, 6, 7, 8}  # the one that is cut off has a good beginning
    assert samples.groups == ["5x32x32"] * 5  # 17 frames at 8 per second are 9 at 4
    wanted = fit_video(read_frames(clips[2].video, (0, 2, 4, 6, 8), 4.0), 32, 32).to_pixels()
    assert torch.equal(samples[2]["pixels"], wanted)
    plan = BatchPlan(samples.groups, 5, seed=1)
    streams = [ClipStream(samples=samples, plan=plan, num_workers=workers) for workers in (0, 2)]
    for (_, one), (_, other), _ in zip(*(iter(stream) for stream in streams), range(3), strict=False):
        assert one["pixels"].shape == (5, 3, 5, 32, 32) and torch.equal(one["pixels"], other["pixels"])
    assert all(stream.skipped.keys() == {4} for stream in streams)
    with pytest.raises(SettingError, match="none of 9 clips can be used"):
        PixelClips(clips, parse_buckets(["25x32x32"]), 8.0)
