"""Tables of token clusters: read from a user's file, or made from the codebook of the image codec."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogvideo_ar.sampling import cluster_codebook
from shared.checkpoints import load_tensors, save_tensors
from shared.errors import SettingError, WeightsError
from shared.files import atomic_path

FILE = "cluster_labels.safetensors"  # of a model folder
CODES_PER_CLUSTER = 40  # as released: 20000 tokens in 500 clusters


def read_clusters(path: str | Path, num_tokens: int) -> Tensor:
    """int64 [num_tokens]: the cluster of every image token, from a .npy file (as CogVideo's
    `cluster_label2.npy`) or a .safetensors file with one tensor. WeightsError where it is no such table."""
    path = Path(path)
    labels = _from_numpy(path) if path.suffix == ".npy" else _only_tensor(path)
    if labels.shape != (num_tokens,):
        raise WeightsError(
            f"{path} has the shape {list(labels.shape)}, needed is one label for {num_tokens} tokens"
        )
    if labels.is_floating_point() or labels.is_complex() or int(labels.min()) < 0:
        raise WeightsError(f"{path} must hold whole numbers from 0, got {labels.dtype}")
    return labels.long()


def _from_numpy(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except Exception as error:  # numpy raises of all kinds on damaged files
        raise WeightsError(f"{path} is not an array of integers: {error}") from error


def _only_tensor(path: Path) -> Tensor:
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    tensors = load_tensors(path)
    if len(tensors) != 1:
        raise WeightsError(f"{path} must hold one tensor, it has {len(tensors)}")
    return next(iter(tensors.values()))


def write_clusters(labels: Tensor, path: Path) -> Path:
    """Write a table as .npy (beside released checkpoints) or .safetensors."""
    if path.suffix not in (".npy", ".safetensors"):
        raise SettingError(f"{path} must end in .npy or .safetensors")
    if path.suffix == ".safetensors":
        return save_tensors({"labels": labels}, path)
    with atomic_path(path) as temporary:
        np.save(temporary, labels.numpy())
    return path


def make_clusters(codebook_VD: Tensor, num_clusters: int | None = None, *, seed: int = 0) -> Tensor:
    """k-means of the codebook's rows -> labels int64 [V], the same for a seed; by default one cluster for
    every 40 codes. SettingError for a number that is not possible."""
    size = len(codebook_VD)
    if num_clusters is None:
        num_clusters = max(1, size // CODES_PER_CLUSTER)
    if not 1 <= num_clusters <= size:
        raise SettingError(f"num_clusters {num_clusters} is not possible; legal: 1 to {size}")
    return cluster_codebook(codebook_VD, num_clusters, seed)


def clusters_mark(labels: Tensor) -> str:
    """16 hex digits that tell tables apart."""
    return hashlib.sha256(labels.long().cpu().numpy().tobytes()).hexdigest()[:16]
