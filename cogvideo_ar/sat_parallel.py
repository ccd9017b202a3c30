"""SAT checkpoints written with model parallelism: every rank has its part of the cut tensors.

| tensors | cut along |
|---|---|
| word embeddings | rows |
| QKV, weight and bias | rows, each third on its own: a rank has its heads of Q, of K and of V |
| first matrix of the MLP, weight and bias | rows |
| output projection, second matrix of the MLP, weight | columns |
| all others | not at all: the same on every rank |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shared.checkpoints import load_tensors, sat_checkpoint_files
from shared.errors import WeightsError

_CUTS = (  # (names, axis, number of tensors that lie one behind the other on that axis)
    (re.compile(r"transformer\.word_embeddings\.weight"), 0, 1),
    (re.compile(r".*\.query_key_value(\.\d+)?\.(weight|bias)"), 0, 3),
    (re.compile(r".*\.dense_h_to_4h\.(weight|bias)"), 0, 1),
    (re.compile(r".*\.(dense(\.\d+)?|dense_4h_to_h)\.weight"), 1, 1),
)
_LATEST = ("latest", "*/latest", "*/*/latest")


def load_checkpoint(path: Path, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """The tensors of a file or folder; the parts of a model-parallel checkpoint are joined, with
    `shapes_only` on the meta device. WeightsError where parts are absent or contradict each other."""
    if not path.is_dir() or not any(any(path.glob(pattern)) for pattern in _LATEST):
        return load_tensors(path)
    files = sat_checkpoint_files(path)
    ranks = [int(file.name.split("_")[2]) for file in files]
    if ranks != list(range(len(files))):
        raise WeightsError(f"{files[0].parent} has the model-parallel parts {ranks}; some are absent")
    if len(files) == 1:
        return load_tensors(path)
    try:
        return join_ranks([load_tensors(file, device="meta" if shapes_only else "cpu") for file in files])
    except WeightsError as error:
        raise WeightsError(f"the model-parallel parts in {files[0].parent} do not fit: {error}") from error


def join_ranks(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors from those of all ranks, in rank order."""
    if different := sorted(set().union(*parts) - set.intersection(*(set(part) for part in parts))):
        raise WeightsError(f"{different[0]} is not in all of them")
    return {name: _joined(name, [part[name] for part in parts]) for name in parts[0]}


def _joined(name: str, pieces: list[Tensor]) -> Tensor:
    if len({(piece.shape, piece.dtype) for piece in pieces}) > 1:
        raise WeightsError(f"{name} has the shapes {[list(piece.shape) for piece in pieces]}")
    for names, axis, count in _CUTS:
        if names.fullmatch(name):
            if pieces[0].shape[axis] % count:
                raise WeightsError(f"{name} cannot be cut into {count}: {list(pieces[0].shape)}")
            thirds = zip(*(piece.chunk(count, axis) for piece in pieces), strict=True)
            return torch.cat([piece for ranks in thirds for piece in ranks], axis)
    if not pieces[0].is_meta and not all(torch.equal(pieces[0], piece) for piece in pieces[1:]):
        raise WeightsError(f"{name} differs, and should not")
    return pieces[0]
