"""The recorded tiny SAT models, read with the shipped tables. Not a test file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox_diff.checkpoints import merge_sat_adapters, sat_transformer_table
from cogvideox_diff.config import SAT_FINAL_NORM_EPS, ScheduleConfig, TransformerConfig
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.transformer import ExpertTransformer
from shared.checkpoints import convert, load_into, load_tensors
from tests.parity.recorded import case_folder, read_json, read_tensors

NOT_TRANSFORMERS = {"vae"}


def case_names() -> list[str]:
    folder = case_folder("cogvideox") / "sat_tiny"
    names = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and path.name not in NOT_TRANSFORMERS
    )
    assert names, f"no recorded transformer in {folder}"
    return names


@dataclass(frozen=True)
class Case:
    meta: dict[str, Any]
    io: dict[str, Tensor]
    folder: Path

    def inputs(self, batch: slice = slice(None)) -> dict[str, Tensor | None]:
        """The recorded conditions: text, image latents, offset."""
        image = self.io.get("forward.image_latents")
        return {
            "text": self.io["forward.text"][batch],
            "image_latents": None if image is None else image[batch],
            "ofs": self.io.get("forward.ofs"),
        }


@cache
def read_case(name: str) -> Case:
    folder = case_folder("cogvideox") / "sat_tiny" / name
    return Case(read_json(folder / "meta.json"), read_tensors(folder / "io.safetensors"), folder)


def from_diffusers(settings: dict[str, Any], *, final_norm_eps: float) -> TransformerConfig:
    """Our configuration of a diffusers transformer configuration."""
    patch_t, patch = settings["patch_size_t"], settings["patch_size"]
    position = "rope" if settings["use_rotary_positional_embeddings"] else "sincos"
    if settings["use_learned_positional_embeddings"]:
        position = "rope+learned"
    frames = (settings["sample_frames"] - 1) // 4 + 1
    return TransformerConfig(
        num_layers=settings["num_layers"],
        num_heads=settings["num_attention_heads"],
        head_dim=settings["attention_head_dim"],
        in_channels=settings["in_channels"],
        out_channels=settings["out_channels"],
        patch_size=(patch_t or 1, patch, patch),
        position=position,
        grid_rule="slice" if patch_t else "linspace",
        sample_size=(frames, settings["sample_height"], settings["sample_width"]),
        sincos_scale=settings["spatial_interpolation_scale"],
        time_embed_dim=settings["time_embed_dim"],
        ofs_embed_dim=settings["ofs_embed_dim"] or 0,
        text_dim=settings["text_embed_dim"],
        text_len=settings["max_text_seq_length"],
        final_norm_eps=final_norm_eps,
    )


def load_model(case: Case) -> ExpertTransformer:
    config = from_diffusers(case.meta["diffusers_config"], final_norm_eps=SAT_FINAL_NORM_EPS)
    tensors = merge_sat_adapters(
        load_tensors(case.folder / "transformer"), alpha=case.meta.get("lora", {}).get("alpha", 1)
    )
    model = ExpertTransformer(config)
    return load_into(model, convert(tensors, sat_transformer_table(config)), dtype=torch.float32).eval()


def load_schedule(case: Case) -> NoiseSchedule:
    return NoiseSchedule.from_config(ScheduleConfig(snr_shift=case.meta["snr_shift_scale"]))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()
