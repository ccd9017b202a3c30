"""Stage models of the recorded cases, shared by the parity tests of the transformer."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideo_ar.checkpoints import SAT_STAGE
from cogvideo_ar.config import TransformerConfig
from cogvideo_ar.transformer import CogVideoTransformer
from shared.checkpoints import convert
from tests.parity.recorded import case_folder, read_json, read_tensors

FOLDER = "cogvideo_ar"


def folder() -> Path:
    return case_folder(FOLDER)


def config_of(
    facts: dict[str, Any], *, window: int, start_of_image: int, frame_len: int
) -> TransformerConfig:
    """The recorded sizes as a config; frames are square."""
    side = round(frame_len**0.5)
    positions = facts.get("max_sequence_length", 1024), facts.get("additional_seqlen", 2000)
    return TransformerConfig(
        num_layers=facts["num_layers"],
        num_heads=facts["num_attention_heads"],
        head_dim=facts["hidden_size"] // facts["num_attention_heads"],
        vocab_size=facts["vocab_size"],
        num_image_tokens=facts["num_image_tokens"],
        start_of_image=start_of_image,
        pad_token=facts["num_image_tokens"],
        num_positions=positions[0],
        num_extra_positions=positions[1],
        grid=(side, side),
        temporal="window" if window > 0 else "full",
        window=max(window, 0),
    )


def special_ids() -> dict[str, int]:
    """Text piece -> id of the stand-in tokenizer."""
    facts = read_json(folder() / "tokenizer_table.json")
    return {piece: facts["num_image_tokens"] + i for i, piece in enumerate(facts["table"])}


@cache
def stage_weights(stage: int) -> dict[str, Tensor]:
    """Float16 weights by upstream name."""
    weights = read_tensors(folder() / "weights_stage1.safetensors")
    if stage == 2:
        weights |= read_tensors(folder() / "weights_stage2_mixins.safetensors")
    return weights


@cache
def fullvocab_weights() -> dict[str, Tensor]:
    weights = read_tensors(folder() / "fullvocab_weights.safetensors")
    scaled = weights.pop("transformer.word_embeddings.weight_times_64")
    return weights | {"transformer.word_embeddings.weight": scaled.float() / 64}


def build(config: TransformerConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> CogVideoTransformer:
    """A model in eval mode with upstream weights."""
    with torch.device("meta"):
        model = CogVideoTransformer(replace(config))
    tensors = {name: tensor.to(dtype) for name, tensor in convert(weights, SAT_STAGE).items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


class TableTokenizer:
    """The stand-in tokenizer of the recorded cases: one character per token."""

    def __init__(self) -> None:
        self.ids = special_ids()

    def encode(self, text: str) -> list[int]:
        return [self.ids[character] for character in text]

    def id_of(self, piece: str) -> int:
        return self.ids[piece]
