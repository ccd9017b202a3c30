"""Model folders in our layout, in diffusers' and in SAT's, told apart by content; configuration first.

Ours: config.json, transformer.safetensors, vae.safetensors, text_encoder.safetensors, tokenizer/spiece.model;
or config.json and a difference from another such folder (see `delta`).
diffusers: model_index.json and a folder per part; a configuration of ours beside them is preferred, since
diffusers' own files know neither frame rates nor legal lengths. SAT: see `sat_layout`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER, DIFFUSERS_VAE
from cogvideox_diff.config import CogVideoXConfig
from cogvideox_diff.delta import apply_delta
from cogvideox_diff.diffusers_config import PIECES, config_from_diffusers, diffusers_configs, pipeline_index
from cogvideox_diff.sat_layout import TEXT_FOLDER, is_sat, read_sat, sat_config
from cogvideox_diff.text_encoder import T5TextEncoder
from cogvideox_diff.transformer import ExpertTransformer
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.checkpoints import convert, invert, load_into, load_tensors, save_tensors
from shared.config_io import from_plain, read_header, save_config
from shared.errors import SettingError, WeightsError
from shared.files import write_json
from shared.runtime import parse_dtype

FAMILY = "cogvideox_diff"
FORMAT = 1
DEMOS = {
    "demo": Path(__file__).parent / "demo",
    "demo-i2v": Path(__file__).parent / "demo" / "image_to_video",
}
OUR_CONFIG = "config.json"
FOREIGN_CONFIG = "cogvideox_diff.json"  # ours, in a diffusers folder
DIFFUSERS_INDEX = "model_index.json"
TOKENIZER = "tokenizer"

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Layout = Literal["ours", "diffusers", "sat"]


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A folder whose configuration was read, and no weights yet."""

    path: Path
    layout: Layout
    config: CogVideoXConfig
    trained_dtype: torch.dtype  # what the model computes in unless another is asked for
    base: Path | None = None  # ours: the folder that this one differs from in its transformer

    @property
    def tokenizer(self) -> Path:
        return (self.base or self.path) / (TEXT_FOLDER if self.layout == "sat" else TOKENIZER)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The three nets of a model."""

    transformer: ExpertTransformer
    vae: CausalVAE
    text_encoder: T5TextEncoder


def open_folder(source: str | Path, config: CogVideoXConfig | None = None) -> ModelFolder:
    """Recognise `source` ("demo", "demo-i2v" or a folder) and read its configuration.

    `config` replaces that of a SAT folder, which has none of its own; without it the released model of the
    same structure is taken. Raises WeightsError where there is no such folder or nothing in it is known."""
    path = DEMOS.get(str(source), Path(source))
    if not path.is_dir():
        raise WeightsError(
            f"there is no folder {path}; legal: {', '.join(DEMOS)}, "
            f"or a folder with {OUR_CONFIG} or {DIFFUSERS_INDEX}"
        )
    if (path / DIFFUSERS_INDEX).is_file():
        return _open_diffusers(path)
    if (path / OUR_CONFIG).is_file():
        return _open_ours(path)
    if is_sat(path):
        dtype = _stored_dtype(path / "transformer")
        return ModelFolder(path=path, layout="sat", config=config or sat_config(path), trained_dtype=dtype)
    raise WeightsError(
        f"{path} is no model folder: neither {OUR_CONFIG} (ours) nor {DIFFUSERS_INDEX} (diffusers) nor "
        "transformer/latest (SAT) is in it"
    )


def load_parts(folder: ModelFolder, dtype: torch.dtype) -> Parts:
    """Read the weights, cast to `dtype`, into nets built without memory of their own."""
    read = {"ours": _read_ours, "diffusers": _read_diffusers, "sat": _read_sat}[folder.layout]
    transformer, vae, text = read(folder)
    config = folder.config
    with torch.device("meta"):
        empty = ExpertTransformer(config.transformer), CausalVAE(config.vae), T5TextEncoder(config.text)
    return Parts(
        transformer=_filled(empty[0], transformer, dtype),
        vae=_filled(empty[1], vae, dtype),
        text_encoder=_tied(_filled(empty[2], _text_dtypes(text, dtype), None)),
    )


def _filled(model: ModuleT, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> ModuleT:
    load_into(model, tensors, dtype=dtype)
    return model.eval().requires_grad_(False)


# ---- text encoder

_SHARED, _EMBED = "t5.shared.weight", "t5.encoder.embed_tokens.weight"  # two names of one table


def _text_dtypes(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast, but keep in float32 the matrices that overflow in float16; the table appears under both names."""
    kept = ".wo." if dtype == torch.float16 else None
    cast = {
        name: x.to(torch.float32 if kept and kept in name else dtype)
        for name, x in tensors.items()
        if name != _EMBED
    }
    if _SHARED in cast:
        cast[_EMBED] = cast[_SHARED]
    return cast


def _tied(encoder: T5TextEncoder) -> T5TextEncoder:
    encoder.t5.encoder.embed_tokens.weight = encoder.t5.shared.weight
    return encoder


def _text_tensors(encoder: T5TextEncoder) -> dict[str, Tensor]:
    return {name: x for name, x in encoder.state_dict().items() if name != _EMBED}


# ---- ours


def _open_ours(path: Path) -> ModelFolder:
    config, dtype = _read_config(path / OUR_CONFIG)
    base = read_header(path / OUR_CONFIG).get("base")
    whole = None if base is None else (path / str(base)).resolve()
    return ModelFolder(path=path, layout="ours", config=config, trained_dtype=dtype, base=whole)


def _read_config(path: Path) -> tuple[CogVideoXConfig, torch.dtype]:
    header = read_header(path)
    got = header.get("family"), header.get("format")
    if got != (FAMILY, FORMAT):
        raise WeightsError(f"{path} is of (family, format) {got}, this code reads {(FAMILY, FORMAT)}")
    try:
        config = from_plain(CogVideoXConfig, header["config"])
        return config, parse_dtype(header.get("dtype", "float32"))
    except WeightsError:
        raise
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path} does not describe a model: {error}") from error


def _read_ours(folder: ModelFolder) -> tuple[dict[str, Tensor], ...]:
    names = ("transformer", "vae", "text_encoder")
    whole = folder.base or folder.path
    transformer, *others = (load_tensors(whole / f"{name}.safetensors") for name in names)
    if folder.base is not None:
        transformer = apply_delta(transformer, folder.path)
    return transformer, *others


def write_ours(
    folder: Path,
    config: CogVideoXConfig,
    parts: Parts,
    tokenizer: Path,
    *,
    stored: torch.dtype | None,
    run: str,
) -> None:
    """Write our layout; `stored` is the type on disk (None: as in memory), `run` the one to compute in."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "transformer": parts.transformer.state_dict(),
        "vae": parts.vae.state_dict(),
        "text_encoder": _text_tensors(parts.text_encoder),
    }
    for name, content in tensors.items():
        save_tensors(_cast(content, stored), folder / f"{name}.safetensors")
    _copy_tokenizer(tokenizer, folder / TOKENIZER)
    save_config(config, folder / OUR_CONFIG, family=FAMILY, format=FORMAT, dtype=run)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {name: x if dtype is None else x.to(dtype) for name, x in tensors.items()}


def _copy_tokenizer(source: Path, target: Path) -> None:
    """A tokenizer folder's files (or the one model file) into `target`."""
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copyfile(source, target / "spiece.model")
        return
    for file in (file for file in source.iterdir() if file.is_file()):
        shutil.copyfile(file, target / file.name)


# ---- diffusers: reading


def _open_diffusers(path: Path) -> ModelFolder:
    dtype = _stored_dtype(path / "transformer")
    if (path / FOREIGN_CONFIG).is_file():
        config, dtype = _read_config(path / FOREIGN_CONFIG)
        return ModelFolder(path=path, layout="diffusers", config=config, trained_dtype=dtype)
    plain = {part: _read_json(path / part / "config.json") for part in ("transformer", "vae", "text_encoder")}
    plain["scheduler"] = _read_json(path / "scheduler" / "scheduler_config.json")
    try:
        config = config_from_diffusers(plain)
    except WeightsError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"the configurations in {path} do not describe a CogVideoX model: {error}"
        ) from error
    return ModelFolder(path=path, layout="diffusers", config=config, trained_dtype=dtype)


def _stored_dtype(folder: Path) -> torch.dtype:
    tensors = load_tensors(folder, device="meta")
    return next(x.dtype for x in tensors.values() if x.is_floating_point())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from error


def _read_diffusers(folder: ModelFolder) -> tuple[dict[str, Tensor], ...]:
    transformer = load_tensors(folder.path / "transformer")
    if folder.config.transformer.position != "rope+learned":
        transformer.pop("patch_embed.pos_embedding", None)  # the fixed table, computed here
    return (
        convert(transformer, DIFFUSERS_TRANSFORMER),
        convert(load_tensors(folder.path / "vae"), DIFFUSERS_VAE),
        _read_t5(folder.path / "text_encoder"),
    )


def _read_t5(folder: Path) -> dict[str, Tensor]:
    """transformers' encoder; a decoder in the same files is left out."""
    return {f"t5.{n}": x for n, x in load_tensors(folder).items() if n.startswith(("shared.", "encoder."))}


def _read_sat(folder: ModelFolder) -> tuple[dict[str, Tensor], ...]:
    text = folder.path / TEXT_FOLDER
    if not text.is_dir():
        raise WeightsError(
            f"missing {text}: put the text encoder and its tokenizer there, as for the SAT code"
        )
    return *read_sat(folder.path, folder.config), _read_t5(text)


# ---- diffusers: writing


def write_diffusers(
    folder: Path,
    config: CogVideoXConfig,
    parts: Parts,
    tokenizer: Path,
    *,
    stored: torch.dtype | None,
    run: str,
) -> None:
    """Write a folder that diffusers' CogVideoX pipelines load; arguments as `write_ours`."""
    _warn_of_losses(config)
    written = {
        "transformer": invert(parts.transformer.state_dict(), DIFFUSERS_TRANSFORMER),
        "vae": invert(parts.vae.state_dict(), DIFFUSERS_VAE),
        "text_encoder": {n.removeprefix("t5."): x for n, x in _text_tensors(parts.text_encoder).items()},
    }
    files = dict.fromkeys(written, "diffusion_pytorch_model") | {"text_encoder": "model"}
    for part, plain in diffusers_configs(config).items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        write_json(folder / part / name, plain)
    for part, tensors in written.items():
        path = folder / part / f"{files[part]}.safetensors"
        save_tensors(_cast(tensors, stored), path, {"format": "pt"})
    _copy_tokenizer(tokenizer, folder / TOKENIZER)
    write_json(folder / DIFFUSERS_INDEX, pipeline_index(config))
    save_config(config, folder / FOREIGN_CONFIG, family=FAMILY, format=FORMAT, dtype=run)


def _warn_of_losses(config: CogVideoXConfig) -> None:
    """Say what diffusers' files cannot hold; refuse what its network cannot compute."""
    net, vae = config.transformer, config.vae
    if net.patch_size[1] != net.patch_size[2] or net.mlp_ratio != 4:
        raise SettingError("diffusers knows square patches and an MLP ratio of 4 only")
    if (vae.encode_frames, vae.decode_latents) != PIECES:
        warnings.warn(
            f"diffusers encodes {PIECES[0]} frames and decodes {PIECES[1]} latents at a time, this model "
            f"{vae.encode_frames} and {vae.decode_latents} (0: all): frames will differ unless its VAE's "
            "num_sample_frames_batch_size and num_latent_frames_batch_size are set so",
            stacklevel=4,
        )
