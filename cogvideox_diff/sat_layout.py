"""Folders as the SAT code reads them: `transformer/latest`, `vae/3d-vae.pt`, and `t5-v1_1-xxl/` for the text.

Which released model it is follows from the transformer's structure; noise levels and scales are that model's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cogvideox_diff.checkpoints import SAT_VAE, merge_sat_adapters, sat_transformer_table
from cogvideox_diff.config import PRESETS, SAT_FINAL_NORM_EPS, CogVideoXConfig
from shared.checkpoints import convert, load_tensors
from shared.errors import WeightsError

VAE_FILE = "vae/3d-vae.pt"
TEXT_FOLDER = "t5-v1_1-xxl"  # transformers' layout, model and tokenizer in one folder
_PREFIX = "model.diffusion_model."

Structure = tuple[int, int, int, bool, bool]  # layers, width, input channels, frames in pairs, offset input


def is_sat(path: Path) -> bool:
    return (path / "transformer" / "latest").is_file()


def sat_config(path: Path) -> CogVideoXConfig:
    """The released model whose transformer is built as the one in the folder; WeightsError if none is."""
    found = _structure(load_tensors(path / "transformer", device="meta"), path)
    known = {_structure_of(make()): make for make in PRESETS.values()}
    if found not in known:
        layers, width, channels, *_ = found
        raise WeightsError(
            f"{path}: no released model has {layers} layers of width {width} reading {channels} channels; "
            "give its configuration"
        )
    config = known[found]()
    return replace(config, transformer=replace(config.transformer, final_norm_eps=SAT_FINAL_NORM_EPS))


def _structure_of(config: CogVideoXConfig) -> Structure:
    net = config.transformer
    pairs, offset = net.patch_size[0] > 1, net.ofs_embed_dim > 0
    return net.num_layers, net.hidden_dim, net.in_channels, pairs, offset


def _structure(tensors: Mapping[str, Tensor], path: Path) -> Structure:
    kernel = tensors.get(f"{_PREFIX}mixins.patch_embed.proj.weight")
    if kernel is None:
        raise WeightsError(f"{path / 'transformer'} is no CogVideoX checkpoint: it has no patch embedding")
    layers = {match[1] for name in tensors if (match := re.search(r"transformer\.layers\.(\d+)\.", name))}
    pairs, offset = kernel.ndim == 2, any(f"{_PREFIX}ofs_embed" in name for name in tensors)
    return len(layers), len(kernel), kernel.shape[1] // (8 if pairs else 1), pairs, offset


def read_sat(path: Path, config: CogVideoXConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(transformer, VAE) under our names; adapters in the file are added to their weights."""
    transformer = merge_sat_adapters(load_tensors(path / "transformer"))
    return (
        convert(transformer, sat_transformer_table(config.transformer)),
        convert(load_tensors(path / VAE_FILE), SAT_VAE),
    )
