"""Shards that are encoded once: keys, resuming after a kill, damaged files, sharing between lists."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.clips.dataset import Clip, Extent, read_clips, read_frames
from shared.clips.precompute import (
    Item,
    ShardReader,
    Shards,
    make_key,
    plan_clips,
    precompute_clips,
    read_index,
    write_index,
    write_shards,
)
from shared.errors import SettingError, UserError, WeightsError
from shared.files import machine
from tests.shared.clip_files import broken_files, killed_at, world, write_metadata


def items(count: int, start: int = 0) -> list[Item]:
    return [Item(key=make_key(str(i), "test"), source=i) for i in range(start, count)]


def read(item: Item) -> int:
    return item.source


def doubled(number: int) -> dict[str, Tensor]:
    if number == 4:
        raise UserError("four is not liked")
    return {"twice": torch.tensor([2 * number]), "shape": torch.zeros(number, 2)}


def written(folder: Path, wanted: list[Item], **changes: Any) -> tuple[Shards, list[int]]:
    """The shards, and which numbers were encoded for them."""
    encoded: list[int] = []

    def encode(number: int) -> dict[str, Tensor]:
        encoded.append(number)
        return doubled(number)

    return write_shards(wanted, read, encode, folder, **{"per_shard": 3, "quiet": True, **changes}), encoded


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_shards_give_back_what_was_encoded_and_say_what_was_left_out(tmp_path: Path) -> None:
    shards, encoded = written(tmp_path, items(10))
    assert encoded == list(range(10)) and len(shards.names) == 4
    assert shards.skipped == {make_key("4", "test"): "four is not liked"}
    reader = ShardReader(tmp_path, shards.names)
    for item in items(10):
        assert (item.key in reader) == (item.source != 4)
        if item.source != 4:
            assert {k: v.tolist() for k, v in reader[item.key].items()} == {
                k: v.tolist() for k, v in doubled(item.source).items()
            }


def test_a_second_call_encodes_nothing_and_workers_change_nothing(tmp_path: Path) -> None:
    first, _ = written(tmp_path / "a", items(10))
    before = tree(tmp_path / "a")
    again, encoded = written(tmp_path / "a", items(10))
    assert (again, encoded) == (first, []) and tree(tmp_path / "a") == before
    with_workers, _ = written(tmp_path / "b", items(10), num_workers=2)
    assert with_workers == first and tree(tmp_path / "b") == before


def test_a_dead_worker_is_told_and_finished_shards_stay(tmp_path: Path) -> None:
    """It dies when the first two shards are there."""

    def mortal(item: Item) -> int:
        while item.source == 7 and len(list(tmp_path.glob("*.safetensors"))) < 2:
            time.sleep(0.01)
        if item.source == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return item.source

    with pytest.raises(UserError, match=r"DataLoader worker .* stays; run it again"):
        write_shards(items(10), mortal, doubled, tmp_path, per_shard=3, num_workers=1, quiet=True)
    _, encoded = written(tmp_path, items(10))
    assert encoded == [6, 7, 8, 9]


def test_killed_in_the_middle_and_run_again_the_files_are_the_same(tmp_path: Path) -> None:
    """Killed while the third shard is under way: two are there, nothing else that counts."""

    def work(counted: Any) -> None:
        write_shards(items(10), read, counted(doubled), tmp_path / "killed", per_shard=3, quiet=True)

    assert killed_at(8, work) == -signal.SIGKILL
    whole, _ = written(tmp_path / "whole", items(10))
    left = tree(tmp_path / "killed")
    assert left == {
        f"{name}.safetensors": tree(tmp_path / "whole")[f"{name}.safetensors"] for name in whole.names[:2]
    }
    shards, encoded = written(tmp_path / "killed", items(10))
    assert shards == whole and encoded == [6, 7, 8, 9]
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_another_list_takes_over_what_it_shares(tmp_path: Path) -> None:
    written(tmp_path / "a" / "part", items(10))
    shards, encoded = written(tmp_path / "a" / "part", [*items(13, 10), *items(8, 2)])
    assert encoded == [10, 11, 12]
    fresh, _ = written(tmp_path / "b" / "part", [*items(13, 10), *items(8, 2)])
    assert shards == fresh
    (tmp_path / "a" / "part" / ".0123.4567.tmp.safetensors").write_bytes(b"left by a kill")
    (tmp_path / "a" / f".index.{machine()}.4194303.tmp.json").write_bytes(b"left by a kill")
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_index(folder, kind="test", settings={}, clips=[], skipped=[], shards={"part": shards})
    assert tree(tmp_path / "a") == tree(
        tmp_path / "b"
    )  # shards of the older list are gone, and what a kill left


def test_damaged_shards_are_made_again(tmp_path: Path) -> None:
    shards, _ = written(tmp_path, items(10))
    before = tree(tmp_path)
    path = tmp_path / f"{shards.names[1]}.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    again, encoded = written(tmp_path, items(10))
    assert again == shards and encoded == [3, 4, 5] and tree(tmp_path) == before


def test_faults_that_would_hit_every_item_end_the_call(tmp_path: Path) -> None:
    def encode(number: int) -> dict[str, Tensor]:
        raise WeightsError("no such weights")

    with pytest.raises(WeightsError, match="no such weights"):
        write_shards(items(3), read, encode, tmp_path, quiet=True)
    with pytest.raises(SettingError, match="at least 1 item"):
        write_shards(items(3), read, doubled, tmp_path, per_shard=0)
    with pytest.raises(SettingError, match="num_workers must be 0 to 256"):
        write_shards(items(3), read, doubled, tmp_path, num_workers=-1)


class MiddleFrame:
    """A reader of one frame."""

    def plan(self, clip: Clip, extent: Extent) -> dict[str, Any]:
        if extent.num_frames < 3:
            raise UserError("too short")
        return {"frame": extent.num_frames // 2}

    def read(self, clip: Clip, plan: Any) -> Tensor:
        return read_frames(clip.video, (plan["frame"],), 1.0).frames


def test_bad_files_of_a_list_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    world(tmp_path, 2)
    bad = [*broken_files(tmp_path), "videos/nowhere.mp4"]
    names = ["videos/0.mkv", *bad, "videos/1.mkv"]
    write_metadata(tmp_path, dict.fromkeys(names, "words"))
    clips = read_clips(tmp_path, must_exist=False)
    reader = MiddleFrame()
    results = []
    for workers in (0, 2):
        planned = plan_clips(clips, reader, num_workers=workers, quiet=True)
        folder = tmp_path / str(workers)
        done, left, shards = precompute_clips(
            planned,
            reader,
            lambda frames: {"frames": frames},
            {"x": 1},
            folder,
            num_workers=workers,
            quiet=True,
        )
        assert [row["video"] for row in done] == ["videos/0.mkv", "videos/1.mkv"]
        assert [row["video"] for row in left] == bad
        assert all(row["reason"] for row in left)
        stored = ShardReader(folder, shards.names)[done[0]["key"]]["frames"]
        assert torch.equal(stored, read_frames(clips[0].video, (8,), 1.0).frames)
        results.append(tree(folder))
    assert results[0] == results[1]


def test_keys_change_with_content_plan_and_settings() -> None:
    keys = {make_key("a"), make_key("b"), make_key("a", {"fps": 8}), make_key("a", {"fps": 16})}
    assert len(keys) == 4
    assert make_key("a", {"x": 1, "y": 2}) == make_key("a", {"y": 2, "x": 1})


def test_an_index_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="holds nothing precomputed"):
        read_index(tmp_path, "latents")
    (tmp_path / "index.json").write_text(json.dumps({"kind": "tokens", "format": 1}))
    with pytest.raises(SettingError, match="needed is"):
        read_index(tmp_path, "latents")
