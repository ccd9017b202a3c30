"""A transformer stored as what makes it differ from another model's: a folder whose configuration names the
base's (`base`, a path relative to the folder), and one file.

| in `transformer_delta.safetensors` | meaning |
|---|---|
| `NAME` | this tensor instead of the base's |
| `NAME.lora_A` [R, I], `NAME.lora_B` [O, R] | added to the base's: B A |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cogvideox_diff.lora import adapter_pairs, base_weights
from cogvideox_diff.transformer import ExpertTransformer
from shared.checkpoints import load_tensors, save_tensors
from shared.errors import WeightsError
from shared.files import remove_leftovers

DELTA = "transformer_delta.safetensors"
DOWN, UP = ".lora_A", ".lora_B"


def save_delta(model: ExpertTransformer, base: Mapping[str, Tensor], folder: Path) -> Path:
    """Write adapters as pairs in float16, and whole what else differs from `base`."""
    remove_leftovers(folder)
    own, half = base_weights(model), torch.float16
    content = {
        name: x.to(half)
        for name, x in own.items()
        if x.shape != base[name].shape or not x.to(half).equal(base[name].to(half))
    }
    for path, pair in adapter_pairs(model).items():
        folded = pair.folded()
        content |= {f"{path}.weight{DOWN}": folded.down.to(half), f"{path}.weight{UP}": folded.up.to(half)}
    return save_tensors(content, folder / DELTA)


def apply_delta(base: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The whole transformer's tensors, in the base's types and on its device ("meta": shapes alone).
    WeightsError where the file is not for this base."""
    changes = load_tensors(folder / DELTA, device=str(next(iter(base.values())).device))
    tensors = dict(base)
    for name, x in changes.items():
        target = name.removesuffix(DOWN).removesuffix(UP)
        if target not in base:
            raise WeightsError(f"{folder / DELTA} changes {target}, which its base does not have")
        stored = base[target]
        if name.endswith((DOWN, UP)):
            down, up = (changes.get(target + end) for end in (DOWN, UP))
            if down is None or up is None or not _pairs(down, up, stored):
                raise WeightsError(f"{folder / DELTA} changes {target} by a pair that does not fit its base")
        if name.endswith(DOWN):
            tensors[target] = (stored.float() + changes[target + UP].float() @ x.float()).to(stored.dtype)
        elif not name.endswith(UP):
            tensors[target] = x.to(stored.dtype)
    return tensors


def _pairs(down: Tensor, up: Tensor, stored: Tensor) -> bool:
    """Whether B A can be added to a weight [O, I]."""
    flat = down.ndim == up.ndim == stored.ndim == 2
    return flat and len(down) == up.shape[1] and (len(up), down.shape[1]) == tuple(stored.shape)
