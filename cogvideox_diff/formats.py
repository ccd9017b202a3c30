"""Model folders in our layout, in diffusers' and in SAT's, told apart by content; configuration first.

Ours: config.json, transformer.safetensors, vae.safetensors, text_encoder.safetensors, tokenizer/spiece.model;
or config.json and a difference from another such folder (see `delta`).
diffusers: model_index.json and a folder per part; a configuration of ours beside them is preferred, since
diffusers' own files know neither frame rates nor legal lengths. SAT: see `sat_layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

from cogvideox_diff.config import CogVideoXConfig
from cogvideox_diff.diffusers_config import config_from_diffusers
from cogvideox_diff.model_files import (
    DIFFUSERS_INDEX,
    EMBED,
    FAMILY,
    FOREIGN_CONFIG,
    FORMAT,
    OUR_CONFIG,
    PARTS,
    SHARED,
    TOKENIZER,
    Layout,
    Part,
    empty_net,
    read_json,
    read_part,
    write_model,
)
from cogvideox_diff.sat_layout import is_sat, sat_config, text_folder
from cogvideox_diff.text_encoder import T5TextEncoder
from cogvideox_diff.transformer import ExpertTransformer
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.checkpoints import load_into, load_tensors
from shared.config_io import from_plain, read_header, to_plain
from shared.errors import WeightsError
from shared.runtime import parse_dtype

DEMOS = {
    "demo": Path(__file__).parent / "demo",
    "demo-i2v": Path(__file__).parent / "demo" / "image_to_video",
}


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
        return text_folder(self.path) if self.layout == "sat" else (self.base or self.path) / TOKENIZER


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The three nets of a model."""

    transformer: ExpertTransformer
    vae: CausalVAE
    text_encoder: T5TextEncoder


def open_folder(source: str | Path, config: CogVideoXConfig | None = None) -> ModelFolder:
    """Recognise `source` ("demo", "demo-i2v" or a folder) and read its configuration.

    `config` replaces that of a SAT folder, which has none of its own unless it was written here; without
    either the released model of the same structure is taken. WeightsError where there is no such folder or
    nothing in it is known."""
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
        return _open_sat(path, config)
    raise WeightsError(
        f"{path} is no model folder: neither {OUR_CONFIG} (ours) nor {DIFFUSERS_INDEX} (diffusers) nor "
        "transformer/latest (SAT) is in it"
    )


def load_parts(folder: ModelFolder, dtype: torch.dtype) -> Parts:
    """Read the weights, cast to `dtype`, into nets built without memory of their own."""
    check_weights(folder)
    return Parts(
        transformer=cast("ExpertTransformer", _load(folder, "transformer", dtype)),
        vae=cast("CausalVAE", _load(folder, "vae", dtype)),
        text_encoder=load_text_encoder(folder, dtype),
    )


def check_weights(folder: ModelFolder) -> None:
    """WeightsError unless every part's files hold what the configuration asks for; reads headers alone."""
    for part in PARTS:
        read_part(folder, part, device="meta")
    if not folder.tokenizer.exists():
        raise WeightsError(f"{folder.path} lacks its tokenizer: there is no {folder.tokenizer}")


def load_text_encoder(folder: ModelFolder, dtype: torch.dtype) -> T5TextEncoder:
    """That part alone; see `load_parts`."""
    return _tied(cast("T5TextEncoder", _load(folder, "text_encoder", dtype)))


def _load(folder: ModelFolder, part: Part, dtype: torch.dtype) -> nn.Module:
    text = part == "text_encoder"
    tensors = read_part(folder, part, dtype_of=partial(_text_dtype, dtype) if text else lambda name: dtype)
    if text:
        tensors[EMBED] = tensors[SHARED]
    net = empty_net(part, folder.config)
    load_into(net, tensors, dtype=None if text else dtype)
    return net.eval().requires_grad_(False)


def save_model(
    folder: Path,
    layout: Layout,
    config: CogVideoXConfig,
    parts: Parts,
    tokenizer: Path,
    *,
    stored: torch.dtype | None,
    run: str,
) -> None:
    """`model_files.write_model` of nets in memory."""
    nets: dict[Part, nn.Module] = {
        "transformer": parts.transformer,
        "vae": parts.vae,
        "text_encoder": parts.text_encoder,
    }
    write_model(
        folder, layout, config, lambda part: nets[part].state_dict(), tokenizer, stored=stored, run=run
    )


# ---- text encoder


def _text_dtype(dtype: torch.dtype, name: str) -> torch.dtype:
    """Matrices that overflow in float16 stay in float32."""
    return torch.float32 if dtype == torch.float16 and ".wo." in name else dtype


def _tied(encoder: T5TextEncoder) -> T5TextEncoder:
    encoder.t5.encoder.embed_tokens.weight = encoder.t5.shared.weight
    return encoder


# ---- recognising


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
    except (ValueError, TypeError, ArithmeticError) as error:
        raise WeightsError(f"{path} does not describe a model: {error}") from error


def _open_diffusers(path: Path) -> ModelFolder:
    dtype = _stored_dtype(path / "transformer")
    if (path / FOREIGN_CONFIG).is_file():
        config, dtype = _read_config(path / FOREIGN_CONFIG)
        return ModelFolder(path=path, layout="diffusers", config=config, trained_dtype=dtype)
    plain = {part: read_json(path / part / "config.json") for part in ("transformer", "vae", "text_encoder")}
    plain["scheduler"] = read_json(path / "scheduler" / "scheduler_config.json")
    try:
        config = config_from_diffusers(plain)
        config = from_plain(CogVideoXConfig, to_plain(config))  # looks at the types
    except WeightsError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise WeightsError(
            f"the configurations in {path} do not describe a CogVideoX model: {error}"
        ) from error
    return ModelFolder(path=path, layout="diffusers", config=config, trained_dtype=dtype)


def _stored_dtype(folder: Path) -> torch.dtype:
    tensors = load_tensors(folder, device="meta")
    return next(x.dtype for x in tensors.values() if x.is_floating_point())


def _open_sat(path: Path, config: CogVideoXConfig | None) -> ModelFolder:
    dtype = _stored_dtype(path / "transformer")
    if config is None and (path / FOREIGN_CONFIG).is_file():
        config, dtype = _read_config(path / FOREIGN_CONFIG)
    return ModelFolder(path=path, layout="sat", config=config or sat_config(path), trained_dtype=dtype)
