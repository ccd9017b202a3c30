"""Folders as the SAT code reads them: `transformer/latest`, `vae/3d-vae.pt`, and `t5-v1_1-xxl/` for the text.

Which released model it is follows from the transformer's structure; noise levels and scales are that model's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cogvideox_diff.config import PRESETS, SAT_FINAL_NORM_EPS, CogVideoXConfig, TransformerConfig
from cogvideox_diff.positions import rope_angles, rope_coordinates, sincos_table
from shared.checkpoints import load_tensors
from shared.errors import WeightsError

VAE_FILE = "vae/3d-vae.pt"
TEXT_FOLDER = "t5-v1_1-xxl"  # transformers' layout, model and tokenizer in one folder
_PREFIX = "model.diffusion_model."
_UNUSED_POSITIONS = 64  # rows of the SAT trunk's own position table, which no model reads

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


def text_folder(path: Path) -> Path:
    """The folder of the text encoder: by its usual name, else the only one that holds a tokenizer."""
    found = sorted(file.parent for file in path.glob("*/spiece.model"))
    return found[0] if len(found) == 1 else path / TEXT_FOLDER


def sat_tables(config: TransformerConfig) -> dict[str, Tensor]:
    """What a SAT file holds beside weights, and its reader misses otherwise: fixed positions, float32."""
    position = _PREFIX + "mixins.pos_embed."
    if config.position == "sincos":
        table = sincos_table(config.sample_grid, config.hidden_dim, scale=config.sincos_scale)
        return {
            position + "pos_embedding": torch.cat(
                [table.new_zeros(config.text_len, config.hidden_dim), table]
            )[None]
        }
    unused = torch.zeros(_UNUSED_POSITIONS, config.hidden_dim)
    tables = {_PREFIX + "transformer.position_embeddings.weight": unused}
    if config.patch_size[0] == 1:  # 1.5 computes its angles anew
        coordinates = rope_coordinates(config.sample_grid, config.sample_grid, config.grid_rule)
        angles = rope_angles(coordinates, config.head_dim).repeat_interleave(2, dim=-1)
        tables |= {position + "freqs_sin": angles.sin(), position + "freqs_cos": angles.cos()}
    return tables
