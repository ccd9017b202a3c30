"""The recorded checkpoints in the released format, with a codec and a text model of fitting sizes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from shared.tokenizers.sentencepiece_training import PieceIds, train_text_model
from tests.parity.recorded import case_folder, read_json, read_tensors

RECORDED = case_folder("cogvideo_ar")
TABLE = read_json(RECORDED / "tokenizer_table.json")
NUM_IMAGE_TOKENS = TABLE["num_image_tokens"]
START = NUM_IMAGE_TOKENS + TABLE["table"].index("<start_of_image>")


def write_released(folder: Path) -> Path:
    """A folder with both stages, `ice_image.pt`, `ice_text.model` and `cluster_label2.npy`."""
    shutil.copytree(RECORDED / "sat_checkpoints", folder, dirs_exist_ok=True)
    codec = {
        name: x.float()
        for name, x in read_tensors(case_folder("icetk") / "vqvae_weights.safetensors").items()
    }
    for name in ("quantize.embed.weight", "quantize.embed_avg", "quantize.cluster_size"):
        repeats = -(-NUM_IMAGE_TOKENS // len(codec[name]))
        codec[name] = torch.cat([codec[name]] * repeats)[:NUM_IMAGE_TOKENS].clone()
    torch.save({"module": codec}, folder / "ice_image.pt")
    symbols = TABLE["table"][: TABLE["table"].index("<start_of_chinese>") + 1]
    train_text_model(
        ["a b c"] * 9,
        folder / "ice_text.model",
        vocab_size=len(symbols) + 5,
        ids=PieceIds(unk=len(symbols), bos=-1, eos=-1, pad=symbols.index("<pad>")),
        user_defined_symbols=symbols[1:],
    )
    np.save(folder / "cluster_label2.npy", np.arange(NUM_IMAGE_TOKENS) % 7)
    return folder
