"""Clips as a codec encodes them, kept in a file that says what it was made from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.checkpoints import load_metadata, load_tensors, save_tensors

MADE_FROM = "made_from"  # metadata entry with the key


def cache_key(codec: nn.Module, *, num_clips: int, seed: int, num_frames: int) -> str:
    """Changes with the clips (how many, which, how long) and with any of the codec's weights; JSON."""
    made_from = {"num_clips": num_clips, "seed": seed, "num_frames": num_frames, "codec": codec_mark(codec)}
    return json.dumps(made_from)


def codec_of(key: str) -> str:
    """The `codec_mark` in a `cache_key`."""
    return json.loads(key)["codec"]


def codec_mark(codec: nn.Module) -> str:
    """64 hex digits that change with any of the codec's weights."""
    digest = hashlib.sha256()
    for name, x in codec.state_dict().items():
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_cache(path: Path, name: str, key: str, num_clips: int) -> Tensor | None:
    """The tensor `name` [num_clips, ...] of an earlier `write_cache`; None where there is no file or it was
    made from something else. Files of before there were keys are told by their number of rows alone.
    WeightsError for a file that is damaged."""
    if not path.exists():
        return None
    found = load_metadata(path).get(MADE_FROM)
    if found not in (None, key):
        return None
    encoded = load_tensors(path).get(name)
    return encoded if encoded is not None and len(encoded) == num_clips else None


def write_cache(path: Path, name: str, key: str, encoded: Tensor) -> None:
    save_tensors({name: encoded}, path, {MADE_FROM: key})
