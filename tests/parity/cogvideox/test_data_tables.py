"""Frames and timesteps that the released training code takes, errors included."""

from __future__ import annotations

from typing import Any

import pytest

from cogvideox_diff.training.frames import finetune_indices, sat_indices
from cogvideox_diff.training.timesteps import rank_interval
from shared.errors import SettingError
from tests.parity.recorded import case_folder, read_json

pytestmark = pytest.mark.parity
TABLES: dict[str, list[dict[str, Any]]] = read_json(case_folder("cogvideox") / "data_tables.json")


def test_every_table_has_a_test() -> None:
    known = {"sat_sft_dataset_frames", "finetune_resize_frames", "uniform_timestep_intervals"}
    assert TABLES.keys() == known and all(TABLES.values())


def test_frames_of_the_sat_data_set() -> None:
    for row in TABLES["sat_sft_dataset_frames"]:
        wanted = {name: row[name] for name in ("target_fps", "max_frames", "skip")}
        if "error" in row:
            with pytest.raises(SettingError):
                sat_indices(row["video_frames"], row["video_fps"], **wanted)
            continue
        got = sat_indices(row["video_frames"], row["video_fps"], **wanted)
        assert list(got) == row["source_index"], row
        assert len(set(got)) == row["num_frames"], row


def test_frames_of_the_finetuning_data_set() -> None:
    for row in TABLES["finetune_resize_frames"]:
        got = finetune_indices(row["video_frames"], max_frames=row["max_frames"])
        assert list(got) == row["source_index"], row


def test_timestep_intervals() -> None:
    for row in TABLES["uniform_timestep_intervals"]:
        ranks, groups = row["data_parallel_size"], row["group_num"]
        if "error" in row:
            with pytest.raises(SettingError):
                rank_interval(0, ranks, groups, released=True)
            continue
        got = [rank_interval(rank, ranks, groups, released=True) for rank in range(ranks)]
        assert [[x.start, x.stop] for x in got] == row["half_open_interval_per_rank"], row
