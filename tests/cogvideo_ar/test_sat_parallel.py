"""The recorded checkpoints cut for model parallelism, as upstream's layers cut them, are read as if whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvideo_ar.checkpoints import SAT_DSR, SAT_ITERSR, SAT_STAGE
from cogvideo_ar.sat_layout import checkpoint_kind
from cogvideo_ar.sat_parallel import join_ranks, load_checkpoint
from shared.checkpoints import Table, convert, load_tensors, sat_checkpoint_file
from shared.errors import WeightsError
from tests.parity.recorded import case_folder

pytestmark = pytest.mark.parity
STAGES = case_folder("cogvideo_ar") / "sat_checkpoints"
FINE = case_folder("cogview2_sr")
CHECKPOINTS = [
    (STAGES / "cogvideo-stage1", SAT_STAGE, "stage"),
    (STAGES / "cogvideo-stage2", SAT_STAGE, "stage"),
    (FINE / "cogview2-dsr", SAT_DSR, "direct"),
    (FINE / "cogview2-itersr", SAT_ITERSR, "iterative"),
]


def cut(name: str, whole: Tensor, rank: int, size: int) -> Tensor:
    """A rank's part: of `strides * size` equal pieces every `size`-th."""
    axis, strides = 0, 3 if "query_key_value" in name else 1
    if name.endswith("weight") and (".dense." in name or "dense_4h_to_h" in name):
        axis = 1
    elif "query_key_value" not in name and "dense_h_to_4h" not in name and "word_embeddings" not in name:
        return whole
    return torch.cat(whole.chunk(strides * size, axis)[rank::size], axis)


def write_parts(source: Path, target: Path, size: int) -> list[Path]:
    whole, file = load_tensors(source), sat_checkpoint_file(source)
    shutil.copytree(source, target)
    parts = []
    for rank in range(size):
        module = {name: cut(name, x, rank, size).clone() for name, x in whole.items()}
        parts.append(target / file.parent.name / f"mp_rank_{rank:02d}_model_states.pt")
        torch.save({"module": module}, parts[-1])
    return parts


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("source", "table", "kind"), CHECKPOINTS)
def test_parts_make_the_whole(source: Path, table: Table, kind: str, size: int, tmp_path: Path):
    parts = write_parts(source, tmp_path / "parts", size)
    whole, joined = load_tensors(source), load_checkpoint(tmp_path / "parts")
    name = "transformer.layers.0.attention.query_key_value.weight"
    assert load_tensors(parts[1])[name].shape[0] * size == whole[name].shape[0]
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)
    convert(joined, table)  # all names are known
    shapes = load_checkpoint(tmp_path, shapes_only=True)  # one level too high
    assert {name: x.shape for name, x in shapes.items()} == {name: x.shape for name, x in whole.items()}
    assert all(x.is_meta for x in shapes.values()) and checkpoint_kind(shapes) == kind


def test_an_undivided_checkpoint_is_left_alone():
    joined = load_checkpoint(STAGES / "cogvideo-stage1")
    assert all(torch.equal(x, joined[name]) for name, x in load_tensors(STAGES / "cogvideo-stage1").items())


def test_an_absent_part_is_named(tmp_path: Path):
    parts = write_parts(STAGES / "cogvideo-stage1", tmp_path / "parts", 4)
    parts[1].unlink()
    with pytest.raises(WeightsError, match=r"parts \[0, 2, 3\]; some are absent"):
        load_checkpoint(tmp_path / "parts")


def test_parts_that_contradict_each_other_are_refused():
    norm, table = "transformer.final_layernorm.bias", "transformer.word_embeddings.weight"
    part = {norm: torch.zeros(2), table: torch.zeros(2, 2)}
    assert join_ranks([part, part])[table].shape == (4, 2)
    with pytest.raises(WeightsError, match=r"final_layernorm\.bias differs"):
        join_ranks([part, part | {norm: torch.ones(2)}])
    with pytest.raises(WeightsError, match=r"word_embeddings\.weight is not in all"):
        join_ranks([part, {norm: part[norm]}])
    with pytest.raises(WeightsError, match=r"word_embeddings\.weight has the shapes \[\[2, 2\], \[1, 2\]\]"):
        join_ranks([part, part | {table: torch.zeros(1, 2)}])
