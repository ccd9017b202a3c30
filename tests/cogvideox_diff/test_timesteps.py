"""Explicit Uniform Sampling: intervals that cover every timestep once, and draws that keep to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideox_diff.training.timesteps import WHOLE, Share, interval, rank_interval
from shared.distributed import ParallelContext
from shared.errors import SettingError
from shared.training_parallel import Strategy
from tests.parity.recorded import case_folder, read_json


@given(st.integers(1, 1200), st.integers(1, 1200))
def test_intervals_cover_every_timestep_once(parts: int, num_timesteps: int) -> None:
    if parts > num_timesteps:
        with pytest.raises(ValueError, match=f"of {parts} in {num_timesteps}"):
            interval(0, parts, num_timesteps)
        return
    intervals = [interval(place, parts, num_timesteps) for place in range(parts)]
    assert [t for each in intervals for t in each] == list(range(num_timesteps))
    widths = {len(each) for each in intervals}
    assert max(widths) - min(widths) <= 1


def test_released_intervals_are_the_recorded_ones() -> None:
    cases = read_json(case_folder("cogvideox") / "data_tables.json")["uniform_timestep_intervals"]
    assert cases
    for case in cases:
        ranks, groups = case["data_parallel_size"], case["group_num"]
        if "error" in case:
            with pytest.raises(SettingError, match=f"{groups} groups do not divide {ranks} ranks"):
                rank_interval(0, ranks, groups, released=True)
            continue
        intervals = [rank_interval(rank, ranks, groups, released=True) for rank in range(ranks)]
        assert [[i.start, i.stop] for i in intervals] == case["half_open_interval_per_rank"]


@pytest.mark.parametrize(("ranks", "groups"), [(1, 1), (2, 2), (8, 4), (16, 16), (16, 8), (12, 3), (48, 48)])
def test_ranks_cover_every_timestep_equally_often(ranks: int, groups: int) -> None:
    drawn = np.concatenate([rank_interval(rank, ranks, groups) for rank in range(ranks)])
    assert (np.bincount(drawn, minlength=1000) == ranks // groups).all()


@pytest.mark.parametrize("released", [False, True])
def test_uneven_groups_are_refused(released: bool) -> None:
    with pytest.raises(SettingError, match="5 groups do not divide 16 ranks; legal: 1, 2, 4, 8, 16"):
        rank_interval(0, 16, 5, released=released)


@pytest.mark.parametrize(("accumulation", "world"), [(1, 1), (4, 1), (4, 2), (4, 4), (7, 7), (6, 3)])
def test_micro_batches_of_all_ranks_have_intervals_of_their_own(accumulation: int, world: int) -> None:
    step, rng = 5, np.random.default_rng(0)
    dealt = (Strategy(world=ParallelContext(ranks=tuple(range(world)), rank=rank)) for rank in range(world))
    micros = [micro for strategy in dealt for micro in strategy.micro_steps(step, accumulation)]
    shares = [Share.of(micro, accumulation) for micro in micros]
    assert sorted(share.place for share in shares) == list(range(accumulation))
    for share in shares:
        for size in (1, 3, 20):
            drawn = share.spread(size, rng)
            assert set(drawn.tolist()) <= set(interval(share.place, share.parts))
            assert (np.diff(drawn) >= 0).all()


def test_a_step_draws_every_timestep_equally_often() -> None:
    rng, counts = np.random.default_rng(0), np.zeros(1000)
    for micro in range(4000):
        counts += np.bincount(Share.of(micro, 4).spread(10, rng), minlength=1000)
    expected = 40
    assert abs(counts - expected).max() < 6 * expected**0.5
    assert abs(counts.reshape(40, 25).sum(1) - 1000).max() == 0  # 40 parts, one draw from each a step


def test_the_mean_timestep_of_a_step_moves_less_than_of_independent_draws() -> None:
    rng = np.random.default_rng(0)
    spread = [np.concatenate([Share.of(m, 4).spread(1, rng) for m in range(4)]).mean() for _ in range(500)]
    independent = [WHOLE.spread(1, rng)[0] for _ in range(2000)]
    assert np.std(spread) < 0.4 * np.std(np.reshape(independent, (500, 4)).mean(1))
