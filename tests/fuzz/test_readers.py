"""Files of weights, text models and tables with damaged bytes, through the functions that read them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideo_ar.clusters import read_clusters
from cogvideox_diff.latent_files import read_latents
from cogvideox_diff.lora_files import read_adapter
from shared.checkpoints import load_metadata, load_tensors
from shared.clips.precompute import ShardReader
from shared.doctor.containers import check_file
from shared.errors import WeightsError
from shared.tokenizers.icetk import IceTokenizer
from shared.tokenizers.t5 import T5Tokenizer
from shared.training_state import newest
from tests.fuzz.harness import Tally, runs
from tests.fuzz.mutations import damaged
from tests.fuzz.world import World

Reader = Callable[[Path], object]


def whole(path: Path) -> object:
    """The description first, then the numbers, as the programs do."""
    load_tensors(path, device="meta")
    return load_tensors(path)


def cast(path: Path) -> object:
    return load_tensors(path, dtype_of=lambda name: torch.bfloat16)


def shards(path: Path) -> object:
    reader = ShardReader(path.parent, [path.stem])
    return [reader[key] for key in list(reader._places)]


READERS: dict[str, tuple[str, Reader, int]] = {
    "safetensors": ("ar/keyframes.safetensors", whole, 60),
    "safetensors, cast": ("ar/interpolation.safetensors", cast, 20),
    "safetensors, metadata": ("lora.safetensors", load_metadata, 20),
    "torch archive": ("torch.pt", whole, 60),
    "torch before 1.6": ("old.pt", whole, 60),
    "container": ("torch.pt", check_file, 20),
    "adapter": ("lora.safetensors", read_adapter, 40),
    "latents": ("latents.safetensors", read_latents, 40),
    "shard of clips": ("encoded/latents/*.safetensors", shards, 20),
    "clusters": ("clusters.npy", lambda path: read_clusters(path, 32), 40),
    "clusters, safetensors": ("ar/cluster_labels.safetensors", lambda path: read_clusters(path, 32), 20),
    "training state": ("tuned/run/state.pt", lambda path: newest(path.parent), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes(name: str, world: World, tally: Tally, tmp_path: Path) -> None:
    pattern, reader, count = READERS[name]
    source = next(world.path.glob(pattern))
    data, rng, file = source.read_bytes(), random.Random(name), tmp_path / source.name
    for number in range(runs(count)):
        file.write_bytes(damaged(data, rng))
        tally.read(f"bytes of {name}", f"number {number} of {source.name}", lambda: reader(file))
    file.write_bytes(data)
    reader(file)


@pytest.mark.parametrize("kind", ["icetk", "t5"])
def test_damaged_text_models(kind: str, world: World, tally: Tally, tmp_path: Path) -> None:
    source = {"icetk": "ar/ice_text.model", "t5": "diff/tokenizer/spiece.model"}[kind]
    data, rng, file = (world / source).read_bytes(), random.Random(kind), tmp_path / "spiece.model"

    def read() -> object:
        if kind == "icetk":
            return IceTokenizer(file, special_tokens=("<x>",)).encode("a red circle, ﬁ 中文 <n>")
        return T5Tokenizer(file, text_len=16)(["a red circle, ﬁ 中文"]).ids

    for number in range(runs(20 if kind == "icetk" else 3)):
        file.write_bytes(damaged(data, rng))
        tally.read(f"bytes of the text model ({kind})", f"number {number}", read)


def test_links_pipes_and_folders_in_the_place_of_files(world: World, tally: Tally, tmp_path: Path) -> None:
    """None is waited for or followed for ever."""
    import os

    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "gone.safetensors").symlink_to("nowhere")
    long = tmp_path / ("x" * 300)
    for path in (*sorted(tmp_path.iterdir()), long):
        for reader in (whole, check_file, read_adapter):
            tally.read("odd files", str(path), lambda path=path, reader=reader: reader(path))


def test_an_array_that_promises_too_much(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(32))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(b"(32,)", b"(32" + b"0" * 9 + b",)")[: len(data)])
    with pytest.raises(WeightsError):
        read_clusters(tmp_path / "a.npy", 32)
    shutil.rmtree(tmp_path)
