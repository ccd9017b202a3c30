"""The arithmetic of the cuts, without other processes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvideox_diff.parallel import InferenceGroups, cut_rope, cut_tokens, deal_back, frame_sizes
from cogvideox_diff.vae.causal_conv import chunk_bounds
from shared.distributed import (
    Launch,
    ParallelContext,
    check_degree,
    divisors,
    group_ranks,
    part_sizes,
    started,
)
from shared.errors import SettingError


@given(total=st.integers(0, 100), degree=st.integers(1, 12))
def test_parts_are_complete_and_even(total: int, degree: int) -> None:
    sizes = part_sizes(total, degree)
    assert len(sizes) == degree and sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    assert sorted(sizes, reverse=True) == list(sizes)


def test_thirty_heads_on_four_ranks() -> None:
    assert part_sizes(30, 4) == (8, 8, 7, 7)


@given(degree=st.integers(1, 4), stride=st.integers(1, 4), blocks=st.integers(1, 3))
def test_groups_hold_every_rank_once(degree: int, stride: int, blocks: int) -> None:
    size = degree * stride * blocks
    groups = group_ranks(size, degree, stride)
    assert sorted(rank for group in groups for rank in group) == list(range(size))
    assert all(b - a == stride for group in groups for a, b in pairwise(group))


def test_groups_of_guidance_and_sequence() -> None:
    assert group_ranks(8, 2, 4) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert group_ranks(8, 4) == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_uneven_groups_are_refused() -> None:
    with pytest.raises(SettingError, match=r"4 processes are not legal; legal: 1, 2, 3, 6 \(nearest 3\)"):
        group_ranks(6, 4)


def test_guidance_has_two_halves() -> None:
    alone = ParallelContext()
    assert InferenceGroups.of(alone) == InferenceGroups(guidance=alone, sequence=alone, clip=alone)
    with pytest.raises(SettingError, match="guidance: 2 processes are not legal; legal: 1 "):
        InferenceGroups.of(alone, guidance=2)


def test_divisors_and_legal_degrees() -> None:
    assert divisors(30) == [1, 2, 3, 5, 6, 10, 15, 30]
    check_degree("heads", 5, divisors(30))
    with pytest.raises(SettingError, match=r"heads: 7 processes .* legal: 1, 2, 3, 5, 6"):
        check_degree("heads", 7, divisors(30))


@pytest.mark.parametrize(
    ("num_frames", "degree", "unit", "single", "wanted"),
    [
        (25, 2, 4, True, (13, 12)),  # upstream's rule
        (7, 2, 1, True, (4, 3)),
        (13, 8, 1, True, (3, 2, 2, 2, 1, 1, 1, 1)),  # a remainder, which upstream drops
        (81, 3, 4, True, (29, 28, 24)),
        (6, 2, 1, False, (3, 3)),  # an even count of latents, none of them single
        (5, 1, 4, True, (5,)),
    ],
)
def test_frames_of_each_rank(
    num_frames: int, degree: int, unit: int, single: bool, wanted: tuple[int, ...]
) -> None:
    assert frame_sizes(num_frames, degree, unit=unit, single=single) == wanted
    assert sum(wanted) == num_frames


def test_too_many_ranks_for_a_clip() -> None:
    with pytest.raises(SettingError, match=r"VAE with 9 frames: 3 .* legal: 1, 2 \(nearest 2\)"):
        frame_sizes(9, 3, unit=4, single=True)


def test_rope_of_each_rank() -> None:
    rope = torch.randn(9, 2), torch.randn(9, 2)  # 2 text tokens, then 7 of the video
    parts = [cut_rope(rope, cut_tokens(2, 7, 2), rank) for rank in range(2)]
    for whole, first, second in zip(rope, *parts, strict=True):  # type: ignore[arg-type]
        assert torch.equal(torch.cat([first, second]), whole)
    assert cut_rope(None, cut_tokens(2, 7, 2), 0) is None


@given(text=st.integers(0, 30), video=st.integers(1, 60), degree=st.integers(1, 8))
def test_tokens_of_each_rank(text: int, video: int, degree: int) -> None:
    """Equal numbers in all, the text first and whole."""
    cuts = cut_tokens(text, video, degree)
    assert [sum(cut) for cut in cuts] == list(part_sizes(text + video, degree))
    assert (sum(t for t, _ in cuts), sum(v for _, v in cuts)) == (text, video)
    assert all(v == 0 or rest == 0 for (_, v), (rest, _) in pairwise(cuts))


@given(num_frames=st.integers(4, 40), degree=st.integers(2, 6), stretch=st.sampled_from([1, 4]))
def test_pieces_are_dealt_back_in_order(num_frames: int, degree: int, stretch: int) -> None:
    """Outputs stretch all frames but the clip's first, as the decoder's do."""
    bounds = chunk_bounds(num_frames, 2)
    times = torch.arange(stretch * (num_frames - 1) + 1).view(1, 1, -1, 1, 1)
    ends = [stretch * (end - 1) + 1 for _, end in bounds]
    pieces = times.tensor_split(ends[:-1], dim=2)
    empty = times[:, :, :0]
    dealt = [torch.cat([empty, *pieces[rank::degree]], dim=2) for rank in range(degree)]
    if len(bounds) > 1:
        back = deal_back(dealt, len(bounds))
        assert [x.shape for x in back] == [x.shape for x in pieces]
        assert torch.equal(torch.cat(back, dim=2), times)


# ---- starting


def test_torchrun_environment() -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert Launch.from_torchrun(environment) == Launch(rank=3, world_size=8, local_rank=1)
    del environment["WORLD_SIZE"], environment["MASTER_PORT"]
    with pytest.raises(SettingError, match="WORLD_SIZE, MASTER_PORT not set; start with: torchrun"):
        Launch.from_torchrun(environment)


def test_impossible_backends() -> None:
    launch = Launch(rank=0, world_size=1, local_rank=torch.cuda.device_count())
    with pytest.raises(SettingError, match="nccl needs a GPU per process"), started(launch, "nccl"):
        pass
    with pytest.raises(SettingError, match="unknown backend 'mpi'; legal: auto, gloo, nccl"):
        with started(launch, "mpi"):  # type: ignore[arg-type]
            pass
