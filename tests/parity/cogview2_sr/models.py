"""Models of the recorded super-resolution cases, shared by their tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideo_ar.checkpoints import SAT_DSR, SAT_ITERSR
from cogvideo_ar.config import CogLMConfig, SuperResolutionConfig
from cogvideo_ar.sampling import CogLMSampler
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer
from shared.checkpoints import Table, convert, load_into
from tests.parity.recorded import case_folder, read_json, read_tensors

KINDS = {"dsr": "direct", "itersr": "iterative"}
TABLES: dict[str, Table] = {"dsr": SAT_DSR, "itersr": SAT_ITERSR}


def folder() -> Path:
    return case_folder("cogview2_sr")


@cache
def facts() -> dict[str, Any]:
    return read_json(folder() / "sr_cases.json")


@cache
def cases() -> dict[str, Tensor]:
    """Recorded tensors; the integers as int64."""
    tensors = read_tensors(folder() / "sr_cases.safetensors")
    small = (torch.int8, torch.int16, torch.int32)
    return {name: x.long() if x.dtype in small else x for name, x in tensors.items()}


def square(length: int) -> tuple[int, int]:
    side = round(length**0.5)
    assert side * side == length
    return side, side


def config_of(
    name: str,
    sizes: dict[str, Any],
    layout: list[int],
    *,
    num_image_tokens: int,
    start_of_image: int,
    draw: CogLMConfig | None = None,
) -> SuperResolutionConfig:
    """Recorded sizes as a config; grids are square. An iterative model has no coarse grid."""
    side, side2 = sizes["kernel_size"], sizes["kernel_size2"]
    return SuperResolutionConfig(
        kind=KINDS[name],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_attention_heads"],
        head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
        vocab_size=sizes["vocab_size"],
        num_image_tokens=num_image_tokens,
        start_of_image=start_of_image,
        text_len=layout[0],
        num_positions=sizes["max_sequence_length"],
        coarse_grid=square(layout[1] - layout[0]) if name == "dsr" else (1, 1),
        fine_grid=square(layout[-1] - layout[-2]),
        coarse_kernel=(side2, side2),
        fine_kernel=(2 * side - 1, side),
        draw=draw or CogLMConfig(),
    )


def case_config(name: str) -> SuperResolutionConfig:
    sizes = facts()["config"]
    draw = CogLMConfig(
        temperature=1.0,
        top_k=facts()["dsr"]["topk_clusters"],
        temperature2=facts()["strategy"]["second_softmax_temperature"],
    )
    return config_of(
        name,
        sizes,
        sizes[f"{name}_layout"],
        num_image_tokens=sizes["num_image_tokens"],
        start_of_image=sizes["start_of_image_id"],
        draw=draw,
    )


def build(
    config: SuperResolutionConfig, weights: dict[str, Tensor], table: Table
) -> SuperResolutionTransformer:
    """A float32 model in eval mode."""
    with torch.device("meta"):
        model = SuperResolutionTransformer(config)
    load_into(model, convert(weights, table), dtype=torch.float32)
    return model.eval().requires_grad_(False)


@cache
def case_model(name: str) -> SuperResolutionTransformer:
    return build(case_config(name), read_tensors(folder() / f"{name}_weights.safetensors"), TABLES[name])


def greedy_clusters(labels: Tensor) -> CogLMSampler:
    """The most massive cluster, and its likeliest token."""
    return CogLMSampler(labels, temperature=1.0, top_k=1, temperature2=1e-6)


def texts_of(text_BT: Tensor) -> list[list[int]]:
    return text_BT.tolist()
