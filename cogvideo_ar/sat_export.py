"""A model as a folder with the released parts: checkpoints for SAT, `ice_image.pt` and `ice_text.model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideo_ar.checkpoints import ICETK_VQVAE, SAT_DSR, SAT_ITERSR, SAT_STAGE
from cogvideo_ar.clusters import write_clusters
from cogvideo_ar.config import BlockConfig, SuperResolutionConfig, TransformerConfig
from cogvideo_ar.parts import Parts
from cogvideo_ar.sat_layout import (
    CLUSTERS,
    CODEC,
    STAGE_NAMES,
    TEXT_MODEL,
    codec_config,
    fine_config,
    stage_config,
)
from shared.checkpoints import Table, invert
from shared.errors import SettingError, WeightsError
from shared.files import atomic_path, remove_leftovers, write_json
from shared.torch_files import save_torch

FINE_NAMES = {"direct": "cogview2-dsr", "iterative": "cogview2-itersr"}
NOT_STORED = {  # of training alone, or how many rows are worked on at once
    *("pb_relax", "hidden_dropout", "attention_dropout", "commitment_cost", "codebook_update", "max_batch")
}


def save_sat(parts: Parts, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the released parts; `dtype` is that of the transformers (default: as they are). Sampling is not
    stored. SettingError, before anything is written, for a setting that these files cannot express."""
    stages = [
        _stage(parts, i, config)
        for i, config in enumerate((parts.config.keyframes, parts.config.interpolation))
    ]
    fine = [
        _fine(parts, name) for name in ("super_resolution", "refinement") if getattr(parts, name) is not None
    ]
    codec = invert(parts.vqvae.state_dict(), ICETK_VQVAE)
    _check("vqvae", parts.config.vqvae, lambda: codec_config(codec))
    for name, *_ in (*stages, *fine):
        for place in (folder, folder / name, folder / name / "release"):
            remove_leftovers(place)
    for name in (*STAGE_NAMES, *FINE_NAMES.values()):  # while files are replaced, no checkpoint is whole;
        (folder / name / "latest").unlink(missing_ok=True)  # and one that this model lacks is gone
    for name, facts, tensors in (*stages, *fine):
        _write_checkpoint(folder / name, facts, tensors, dtype or parts.dtype)
    _save({name: x.float() for name, x in codec.items()}, folder / CODEC)
    (folder / CLUSTERS).unlink(missing_ok=True)  # those of another model would be taken for this one's
    if parts.cluster_labels is not None:
        write_clusters(parts.cluster_labels, folder / CLUSTERS)
    with atomic_path(folder / TEXT_MODEL) as temporary:
        temporary.write_bytes(parts.text_model)
    return folder


Checkpoint = tuple[str, dict[str, Any], dict[str, Tensor]]  # folder, model_config.json, tensors


def _stage(parts: Parts, number: int, config: TransformerConfig) -> Checkpoint:
    net = (parts.keyframes, parts.interpolation)[number]
    tensors, ends = invert(net.state_dict(), SAT_STAGE), config.max_text_len
    facts = _facts(config, "CogVideoModel") | {
        "layout": [ends, ends + config.frame_len, ends + config.frame_len * config.num_frames],
        "window_size": config.window or -1,
        "additional_seqlen": config.num_extra_positions,
        "cogvideo_stage": number + 1,
    }
    ids = {name: getattr(config, name) for name in ("num_image_tokens", "start_of_image", "pad_token")}

    def read() -> TransformerConfig:
        found = stage_config(tensors, facts, ids)
        return replace(found, temporal="window", window=config.window) if number and config.window else found

    _check(("keyframes", "interpolation")[number], config, read)
    return STAGE_NAMES[number], facts, tensors


def _fine(parts: Parts, name: str) -> Checkpoint:
    config: SuperResolutionConfig = getattr(parts.config, name)
    direct = config.kind == "direct"
    tables: Table = SAT_DSR if direct else SAT_ITERSR
    tensors = invert(getattr(parts, name).state_dict(), tables)
    ends = [config.text_len, *([config.text_len + config.coarse_len] if direct else [])]
    facts = _facts(config, "DsrModel" if direct else "ItersrModel") | {
        "layout": [*ends, ends[-1] + config.fine_len],
        "new_sequence_length": config.num_positions + config.fine_len,
    }
    ids = {name: getattr(config, name) for name in ("num_image_tokens", "start_of_image")}
    _check(name, config, lambda: fine_config(tensors, facts, ids))
    return FINE_NAMES[config.kind], facts, tensors


def _facts(config: BlockConfig, model_class: str) -> dict[str, Any]:
    return {
        "model_class": model_class,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "vocab_size": config.vocab_size,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "layernorm_order": "sandwich",
        "model_parallel_size": 1,
        "max_sequence_length": config.num_positions,
    }


def _check(part: str, wanted: Any, read: Callable[[], Any]) -> None:
    """SettingError unless a reader finds the settings again."""
    try:
        found = asdict(read())
    except (ValueError, LookupError, WeightsError) as error:
        raise SettingError(f"the released layout cannot hold {part} of these sizes: {error}") from error
    for name, value in asdict(wanted).items():
        if name not in NOT_STORED and found[name] != value:
            raise SettingError(
                f"the released layout cannot say that {part} has the {name} {value!r}; "
                f"it means {found[name]!r}"
            )


def _write_checkpoint(
    folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    whole = {name: x.to(dtype) for name, x in tensors.items()}
    _save(whole, folder / "release" / "mp_rank_00_model_states.pt")
    write_json(folder / "model_config.json", facts)
    with atomic_path(folder / "latest") as temporary:  # last: a checkpoint with it is whole
        temporary.write_text("release", encoding="utf-8")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_torch({"module": {name: x.detach().cpu().contiguous() for name, x in tensors.items()}}, path)
