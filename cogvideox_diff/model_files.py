"""The files of a model in our layout, in diffusers' and in SAT's: reading one part, writing them all.

A part (transformer, VAE, text encoder) is read and written on its own, so that one at a time is in memory.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cogvideox_diff.checkpoints import (
    DIFFUSERS_TRANSFORMER,
    DIFFUSERS_VAE,
    SAT_VAE,
    merge_sat_adapters,
    sat_transformer_table,
)
from cogvideox_diff.config import CogVideoXConfig, TransformerConfig
from cogvideox_diff.delta import apply_delta
from cogvideox_diff.diffusers_config import PIECES, diffusers_configs, pipeline_index
from cogvideox_diff.lora_files import save_sat, save_torch
from cogvideox_diff.sat_layout import TEXT_FOLDER, VAE_FILE, sat_tables
from cogvideox_diff.text_encoder import T5TextEncoder
from cogvideox_diff.transformer import ExpertTransformer
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.checkpoints import DtypeOf, convert, invert, load_into, load_tensors, save_tensors
from shared.config_io import save_config
from shared.errors import SettingError, WeightsError
from shared.files import atomic_path, remove_leftovers, write_json
from shared.json_files import read_object
from shared.model_folder import without_memory

if TYPE_CHECKING:
    from cogvideox_diff.formats import ModelFolder

Layout = Literal["ours", "diffusers", "sat"]
Part = Literal["transformer", "vae", "text_encoder"]
Tensors = Mapping[str, Tensor]

FAMILY = "cogvideox_diff"
FORMAT = 1
PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder")
OUR_CONFIG = "config.json"
FOREIGN_CONFIG = "cogvideox_diff.json"  # ours, in a folder of another layout
DIFFUSERS_INDEX = "model_index.json"
TOKENIZER = "tokenizer"
SHARD_BYTES = 5 * 10**9  # a part above it becomes several files in diffusers' layout
SHARED, EMBED = "t5.shared.weight", "t5.encoder.embed_tokens.weight"  # two names of one table, stored once


# ---- reading


def read_part(
    folder: ModelFolder, part: Part, *, device: str = "cpu", dtype_of: DtypeOf = None
) -> dict[str, Tensor]:
    """One part's tensors under our names, in the types they are stored in, or in those that `dtype_of` gives
    for the stored names; "meta": names and shapes alone.

    Adapters in a SAT file are added to their weights. WeightsError where the files are damaged, or hold not
    exactly the tensors that the folder's configuration asks for."""
    read = {"ours": _read_ours, "diffusers": _read_diffusers, "sat": _read_sat}[folder.layout]
    tensors = read(folder, part, device, dtype_of)
    tensors.pop(EMBED, None)
    check_part(part, tensors, folder.config)
    return tensors


def check_part(part: Part, tensors: Tensors, config: CogVideoXConfig) -> None:
    """WeightsError unless names and shapes are those of the part's net."""
    shapes = {name: x.to("meta") for name, x in tensors.items()}
    if SHARED in shapes:
        shapes[EMBED] = shapes[SHARED]
    load_into(empty_net(part, config), shapes)


def empty_net(part: Part, config: CogVideoXConfig) -> nn.Module:
    """A part's net without memory for its weights."""
    with without_memory():
        if part == "transformer":
            return ExpertTransformer(config.transformer)
        return CausalVAE(config.vae) if part == "vae" else T5TextEncoder(config.text)


def _read_ours(folder: ModelFolder, part: Part, device: str, dtype_of: DtypeOf) -> dict[str, Tensor]:
    file = (folder.base or folder.path) / f"{part}.safetensors"
    tensors = load_tensors(file, device=device, dtype_of=dtype_of)
    return apply_delta(tensors, folder.path) if folder.base is not None and part == "transformer" else tensors


def _read_diffusers(folder: ModelFolder, part: Part, device: str, dtype_of: DtypeOf) -> dict[str, Tensor]:
    if part == "text_encoder":
        return read_t5(folder.path / part, device, dtype_of)
    tensors = load_tensors(folder.path / part, device=device, dtype_of=dtype_of)
    if folder.config.transformer.position != "rope+learned":
        tensors.pop("patch_embed.pos_embedding", None)  # the fixed table, computed here
    return convert(tensors, DIFFUSERS_VAE if part == "vae" else DIFFUSERS_TRANSFORMER)


def _read_sat(folder: ModelFolder, part: Part, device: str, dtype_of: DtypeOf) -> dict[str, Tensor]:
    if part == "vae":
        return convert(load_tensors(folder.path / VAE_FILE, device=device), SAT_VAE)
    if part == "transformer":
        tensors = load_tensors(folder.path / part, device=device)
        stored = {name.replace(".original.", "."): x.dtype for name, x in tensors.items()}
        merged = {name: x.to(stored[name]) for name, x in merge_sat_adapters(tensors).items()}
        return convert(merged, sat_transformer_table(folder.config.transformer))
    if not folder.tokenizer.is_dir():
        raise WeightsError(
            f"missing {folder.tokenizer}: put the text encoder and its tokenizer there, as for the SAT code"
        )
    return read_t5(folder.tokenizer, device, dtype_of)


def read_t5(path: Path, device: str = "cpu", dtype_of: DtypeOf = None) -> dict[str, Tensor]:
    """transformers' encoder; a decoder in the same files is left out."""
    tensors = load_tensors(path, device=device, dtype_of=dtype_of)
    return {f"t5.{name}": x for name, x in tensors.items() if name.startswith(("shared.", "encoder."))}


# ---- writing


def write_model(
    folder: Path,
    layout: Layout,
    config: CogVideoXConfig,
    tensors_of: Callable[[Part], Tensors],
    tokenizer: Path,
    *,
    stored: torch.dtype | None = None,
    run: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder; `tensors_of` gives a part's tensors under our names when its turn comes.

    `stored` is the type on disk (None: as given), `run` the one to compute in. The configuration comes last,
    so a folder that has one is whole. SettingError where the layout cannot hold the model."""
    check_layout(layout, config)
    header = folder / (OUR_CONFIG if layout == "ours" else FOREIGN_CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    for path in (header, *([folder / DIFFUSERS_INDEX] if layout == "diffusers" else [])):
        path.unlink(missing_ok=True)  # while files are replaced, the folder is not whole
    for part in PARTS:
        tensors = {name: x for name, x in tensors_of(part).items() if name != EMBED}
        if stored is not None:
            tensors = {name: x.to(stored) for name, x in tensors.items()}
        _write_part(folder, layout, part, tensors, config.transformer, shard_bytes)
        del tensors  # before the next part is read
    _write_settings(folder, layout, config)
    copy_tokenizer(tokenizer, folder / (TEXT_FOLDER if layout == "sat" else TOKENIZER))
    with atomic_path(header) as temporary:
        save_config(config, temporary, family=FAMILY, format=FORMAT, dtype=run)
    if layout == "diffusers":
        write_json(folder / DIFFUSERS_INDEX, pipeline_index(config))


def check_layout(layout: Layout, config: CogVideoXConfig) -> None:
    """SettingError for what diffusers' network cannot compute; a warning for what its files cannot hold."""
    net, vae = config.transformer, config.vae
    if layout != "diffusers":
        return
    if net.patch_size[1] != net.patch_size[2] or net.mlp_ratio != 4:
        raise SettingError("diffusers knows square patches and an MLP ratio of 4 only")
    if (vae.encode_frames, vae.decode_latents) != PIECES:
        warnings.warn(
            f"diffusers encodes {PIECES[0]} frames and decodes {PIECES[1]} latents at a time, this model "
            f"{vae.encode_frames} and {vae.decode_latents} (0: all): frames will differ unless its VAE's "
            "num_sample_frames_batch_size and num_latent_frames_batch_size are set so",
            stacklevel=4,
        )


def _write_part(
    folder: Path,
    layout: Layout,
    part: Part,
    tensors: Tensors,
    config: TransformerConfig,
    shard_bytes: int,
) -> None:
    if layout == "ours":
        save_tensors(tensors, folder / f"{part}.safetensors")
    elif part == "text_encoder":
        plain = {name.removeprefix("t5."): x for name, x in tensors.items()}
        save_shards(plain, folder / (TEXT_FOLDER if layout == "sat" else part), "model", shard_bytes)
    elif layout == "diffusers":
        table = DIFFUSERS_VAE if part == "vae" else DIFFUSERS_TRANSFORMER
        save_shards(invert(tensors, table), folder / part, "diffusion_pytorch_model", shard_bytes)
    elif part == "transformer":
        save_sat(invert(tensors, sat_transformer_table(config)) | sat_tables(config), folder / part)
    else:
        save_torch({"state_dict": invert(tensors, SAT_VAE)}, folder / VAE_FILE)


def _write_settings(folder: Path, layout: Layout, config: CogVideoXConfig) -> None:
    """The configurations that the other code reads."""
    plain = diffusers_configs(config) if layout != "ours" else {}
    if layout == "sat":
        write_json(folder / TEXT_FOLDER / "config.json", plain["text_encoder"])
        return
    for part, content in plain.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        write_json(folder / part / name, content)


def save_shards(tensors: Tensors, folder: Path, stem: str, limit: int) -> list[Path]:
    """One file STEM.safetensors, or above `limit` bytes several of at most that size and their index."""
    shards = _shards(tensors, limit)
    if len(shards) == 1:
        return [save_tensors(tensors, folder / f"{stem}.safetensors", {"format": "pt"})]
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_tensors({key: tensors[key] for key in shard}, folder / name, {"format": "pt"})
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index: dict[str, Any] = {"metadata": {"total_size": sum(map(_size, tensors.values()))}}
    write_json(
        folder / f"{stem}.safetensors.index.json", index | {"weight_map": dict(sorted(places.items()))}
    )
    return [folder / name for name in names]


def _shards(tensors: Tensors, limit: int) -> list[list[str]]:
    """Names in order, cut before the one that would exceed the limit."""
    shards, room = [[]], limit
    for name, x in tensors.items():
        if shards[-1] and _size(x) > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= _size(x)
    return shards


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def copy_tokenizer(source: Path, target: Path) -> None:
    """A tokenizer folder's files (or the one model file) into `target`; weights beside them stay behind."""
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copyfile(source, target / "spiece.model")
        return
    for file in (file for file in source.iterdir() if file.is_file() and _is_tokenizer(file)):
        shutil.copyfile(file, target / file.name)


def _is_tokenizer(file: Path) -> bool:
    return file.suffix in (".model", ".json", ".txt") and not _is_model_file(file)


def _is_model_file(file: Path) -> bool:
    """What lies beside a tokenizer in a T5 folder of the SAT layout."""
    return file.name in ("config.json", "generation_config.json") or file.name.endswith(".index.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; WeightsError where it is absent or damaged."""
    return read_object(path, WeightsError)
