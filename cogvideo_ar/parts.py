"""A whole CogVideo in memory, and as a model folder.

| file | content |
|---|---|
| `config.json` | family, format, dtype to run in, `CogVideoConfig` |
| `keyframes.safetensors` | the transformer of stage 1 |
| `interpolation.safetensors` | what the transformer of stage 2 does not share with stage 1 |
| `super_resolution.safetensors` | where the config has such a stage: its transformer |
| `refinement.safetensors` | the same, for the refinement of what super-resolution made |
| `vqvae.safetensors`, `ice_text.model` | image codec, text model |
| `cluster_labels.safetensors` | optional: `labels`, the cluster of every image token |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_ar.clusters import FILE as CLUSTERS
from cogvideo_ar.clusters import read_clusters, write_clusters
from cogvideo_ar.config import CogVideoConfig, TransformerConfig
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideo_ar.vqvae import VQVAE
from shared.checkpoints import load_into, load_tensors, save_tensors
from shared.config_io import from_plain, save_config
from shared.errors import WeightsError
from shared.files import atomic_path, remove_leftovers
from shared.model_folder import FORMAT, needed, read_model_header, without_memory
from shared.runtime import parse_dtype
from shared.tokenizers.icetk import IceTokenizer

FAMILY = "cogvideo_ar"
DEMO = Path(__file__).parent / "demo"
TEXT_MODEL = "ice_text.model"
FINE_STAGES = ("super_resolution", "refinement")  # fields of `Parts` and of `CogVideoConfig`
SPECIAL_TOKENS = ("<start_of_image>", "<start_of_english>", "<start_of_chinese>")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A whole model: settings, nets, and the text model, which is kept as bytes to be saved again."""

    config: CogVideoConfig
    keyframes: CogVideoTransformer
    interpolation: CogVideoTransformer
    vqvae: VQVAE
    tokenizer: IceTokenizer
    text_model: bytes
    cluster_labels: Tensor | None = None  # int64 [V]: the cluster of every image token
    super_resolution: SuperResolutionTransformer | None = None  # as the config has it or not
    refinement: SuperResolutionTransformer | None = None  # likewise

    def __post_init__(self) -> None:
        for name in FINE_STAGES:
            if (getattr(self.config, name) is None) != (getattr(self, name) is None):
                what = name.replace("_", "-")
                raise WeightsError(f"{what} must be in both the config and the weights, or in neither")
        check_super_resolution(self.config)
        check_vocabulary(self.tokenizer, self.config.keyframes)

    @property
    def dtype(self) -> torch.dtype:
        return self.keyframes.word_embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.keyframes.word_embeddings.weight.device

    @property
    def nets(self) -> list[nn.Module]:
        """All nets, in the order of their stages."""
        fine = [net for name in FINE_STAGES if (net := getattr(self, name)) is not None]
        return [self.keyframes, self.interpolation, *fine, self.vqvae]


def read_config(folder: Path) -> CogVideoConfig:
    """Settings of a model folder, without its weights."""
    header = read_model_header(folder, FAMILY)
    try:
        return from_plain(CogVideoConfig, header["config"])
    except WeightsError:
        raise
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{folder / 'config.json'}: {error}") from error


def own_dtype(folder: Path) -> torch.dtype:
    """The dtype that the folder names; float32 where it names none."""
    return parse_dtype(read_model_header(folder, FAMILY).get("dtype", "float32"))


class OwnFiles:
    """Where a model folder has its parts; `cogvideo_ar.part_files` has some of them elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def config(self) -> CogVideoConfig:
        """Settings of the model."""
        return read_config(self.folder)

    @property
    def text_model(self) -> Path:
        """The text model; WeightsError where it is missing."""
        return needed(self.folder / TEXT_MODEL)

    def read(self, net: str, dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """The tensors of a net, which is a field of `Parts`; None is the stored type."""
        return load_cast(self.folder / f"{net}.safetensors", dtype, device)

    def read_interpolation(
        self, keyframes: CogVideoTransformer, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """All of stage 2; what it shares with `keyframes` is itself, so that it is moved and pinned once."""
        return dict(keyframes.base_parameters()) | self.read("interpolation", dtype, device)


def load_parts(
    folder: Path, dtype: torch.dtype, device: torch.device, files: OwnFiles | None = None
) -> Parts:
    """Read a model folder: transformers in `dtype`, the codec in float32. `files` are its parts, if not all
    of them are there."""
    files = files or OwnFiles(folder)
    config, text_model = files.config, files.text_model
    tokenizer = load_tokenizer(text_model, config.keyframes.num_image_tokens)
    keyframes = build(CogVideoTransformer, config.keyframes, files.read("keyframes", dtype, device))
    interpolation = files.read_interpolation(keyframes, dtype, device)
    labels = folder / CLUSTERS
    fine: dict[str, SuperResolutionTransformer] = {
        name: build(SuperResolutionTransformer, settings, files.read(name, dtype, device))
        for name in FINE_STAGES
        if (settings := getattr(config, name)) is not None
    }
    return Parts(
        config=config,
        keyframes=keyframes,
        interpolation=build(CogVideoTransformer, config.interpolation, interpolation),
        vqvae=build(VQVAE, config.vqvae, files.read("vqvae", torch.float32, device)),
        tokenizer=tokenizer,
        text_model=text_model.read_bytes(),
        cluster_labels=_labels(labels, config) if labels.is_file() else None,
        super_resolution=fine.get("super_resolution"),
        refinement=fine.get("refinement"),
    )


def _labels(path: Path, config: CogVideoConfig) -> Tensor:
    return read_clusters(path, config.keyframes.num_image_tokens)


def save_parts(parts: Parts, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Write a model folder; `dtype` is that of the stored weights (default: as they are)."""
    base = parts.keyframes.state_dict()
    shared_names = {name for name, _ in parts.interpolation.base_parameters()}
    own = {
        name: x
        for name, x in parts.interpolation.state_dict().items()
        if name not in shared_names or not torch.equal(x, base[name])
    }
    files = {"keyframes": base, "interpolation": own, "vqvae": parts.vqvae.state_dict()}
    files |= {name: net.state_dict() for name in FINE_STAGES if (net := getattr(parts, name)) is not None}
    remove_leftovers(folder)
    (folder / "config.json").unlink(missing_ok=True)  # while files are replaced, the folder is not whole
    for name, tensors in files.items():
        save_tensors(_stored(tensors, dtype), folder / f"{name}.safetensors")
    (folder / CLUSTERS).unlink(missing_ok=True)  # those of another model would be taken for this one's
    if parts.cluster_labels is not None:
        write_clusters(parts.cluster_labels, folder / CLUSTERS)
    with atomic_path(folder / TEXT_MODEL) as temporary:
        temporary.write_bytes(parts.text_model)
    with atomic_path(folder / "config.json") as temporary:  # last: a folder with it is whole
        save_config(parts.config, temporary, family=FAMILY, format=FORMAT, dtype=dtype_name(parts.dtype))
    return folder


def load_tokenizer(text_model: Path, num_image_tokens: int) -> IceTokenizer:
    """The text model, with the special tokens that it does not have itself."""
    tokenizer = IceTokenizer(text_model, num_image_tokens=num_image_tokens)
    tokenizer.add_special_tokens(t for t in SPECIAL_TOKENS if tokenizer[tokenizer[t]] != t)
    return tokenizer


def check_vocabulary(tokenizer: IceTokenizer, config: TransformerConfig) -> None:
    """WeightsError unless the text model has the ids that the transformer expects."""
    ids = {"<start_of_image>": config.start_of_image, "<pad>": config.pad_token}
    for token, wanted in ids.items():
        if tokenizer[token] != wanted:
            raise WeightsError(f"the text model gives {token} the id {tokenizer[token]}, the model {wanted}")
    if tokenizer.num_tokens > config.vocab_size:
        raise WeightsError(
            f"the text model has ids up to {tokenizer.num_tokens - 1}, the model {config.vocab_size} rows"
        )


def check_super_resolution(config: CogVideoConfig) -> None:
    """WeightsError unless the stages can follow the others: super-resolution in one pass, from their grid,
    with their tokens, and refinement from its grid."""
    fine, refinement, frames = config.super_resolution, config.refinement, config.keyframes
    if fine is None:
        if refinement is not None:
            raise WeightsError("refinement needs super-resolution before it")
        return
    if fine.kind != "direct":
        raise WeightsError(f"the pipeline's super-resolution must be 'direct', got {fine.kind!r}")
    same = ["num_image_tokens", "start_of_image"]
    _check_same("super-resolution", fine, "the key frames", frames, same)
    if fine.coarse_grid != frames.grid:
        raise WeightsError(
            f"super-resolution has the coarse_grid {fine.coarse_grid}, the key frames {frames.grid}"
        )
    if refinement is not None:
        if refinement.kind != "iterative":
            raise WeightsError(f"the pipeline's refinement must be 'iterative', got {refinement.kind!r}")
        _check_same("refinement", refinement, "super-resolution", fine, [*same, "fine_grid"])


def check_together(config: CogVideoConfig) -> None:
    """WeightsError unless parts of several models make one: the same frames, tokens and text."""
    first, second, codec = config.keyframes, config.interpolation, config.vqvae
    same = ["grid", "num_image_tokens", "start_of_image", "pad_token"]
    _check_same("the interpolation", second, "the key frames", first, same)
    if codec.codebook_size != first.num_image_tokens:
        raise WeightsError(
            f"the image codec has {codec.codebook_size} codes, the key frames {first.num_image_tokens} tokens"
        )
    check_super_resolution(config)


def _check_same(name: str, config: Any, other: str, before: Any, fields: list[str]) -> None:
    for field in fields:
        got, wanted = getattr(config, field), getattr(before, field)
        if got != wanted:
            raise WeightsError(f"{name} has the {field} {got}, {other} {wanted}")


def load_cast(path: Path, dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a file, cast while they are read; None is the stored type."""
    return load_tensors(
        needed(path), device=str(device), dtype_of=None if dtype is None else lambda name: dtype
    )


def build(kind: Callable[[Any], nn.Module], config: Any, tensors: dict[str, Tensor]) -> Any:
    """A net that holds `tensors` themselves, so that two nets may share some."""
    with without_memory():
        model = kind(config)
    return load_into(model, tensors).eval().requires_grad_(False)


def _stored(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Floating tensors in `dtype`, but for those that it cannot hold (counts of codes in float16)."""
    if dtype is None:
        return tensors
    cast = {name: x.to(dtype) for name, x in tensors.items() if x.is_floating_point()}
    return tensors | {name: x for name, x in cast.items() if bool(x.isfinite().all())}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
