"""Latents in a safetensors file that says what they are: of which model, at which scale, of which video."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from torch import Tensor

from cogvideox_diff.config import CogVideoXConfig
from shared.checkpoints import load_metadata, load_tensors, save_tensors
from shared.config_io import check_type
from shared.errors import OutputPathError, SettingError
from shared.json_files import parse_json

Kind = Literal["clean", "noise"]
FORMAT = "cogvideox-latents-1"
SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class LatentFile:
    """Latents float32 [T, C, H, W] at the transformer's scale, and the video that they are or become.

    "clean": of a video, to be decoded, without padding; "noise": where sampling starts, padding included.
    `model` is the mark of the weights, `settings` how they were made."""

    latents: Tensor
    kind: Kind
    scaling_factor: float
    fps: float
    num_frames: int
    height: int  # pixels
    width: int
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(LatentFile).items():
            check_type(hint, getattr(self, name), name)
        if min(self.scaling_factor, self.fps, self.num_frames, self.height, self.width) <= 0:
            raise ValueError("its scale, rate or size is not positive")

    def described(self) -> dict[str, Any]:
        """All but the numbers, as JSON values."""
        names = ("kind", "scaling_factor", "fps", "num_frames", "height", "width", "model")
        shape = list(self.latents.shape)
        return {name: getattr(self, name) for name in names} | {
            "shape": shape,
            "settings": dict(self.settings),
        }


def write_latents(path: Path, content: LatentFile, *, overwrite: bool = False) -> Path:
    """Write one file, whole or not at all."""
    if path.exists() and not overwrite:
        raise OutputPathError(f"{path} already exists; choose another name or pass --overwrite")
    metadata = {"format": FORMAT} | {key: json.dumps(value) for key, value in content.described().items()}
    return save_tensors({"latents": content.latents.float()}, path, metadata)


def read_latents(path: Path, *, device: str = "cpu") -> LatentFile:
    """What `write_latents` wrote; "meta" reads the description alone. SettingError for another file."""
    if not path.is_file():
        raise SettingError(f"there is no file of latents {path}")
    told, tensors = load_metadata(path), load_tensors(path, device=device)
    if told.get("format") != FORMAT or tensors.keys() != {"latents"} or tensors["latents"].ndim != 4:
        raise SettingError(f"{path} has no latents as this program writes them (format {FORMAT})")
    try:
        content = {key: parse_json(text) for key, text in told.items() if key not in ("format", "shape")}
        return LatentFile(latents=tensors["latents"], **content)
    except (ValueError, TypeError) as error:
        raise SettingError(f"{path} does not say what its latents are: {error}") from error


def check_shape(content: LatentFile, wanted: tuple[int, ...]) -> None:
    """SettingError unless the latents are [T, C, H, W] = `wanted`."""
    if (got := tuple(content.latents.shape)) != wanted:
        raise SettingError(f"the latents are {list(got)}, these settings need {list(wanted)}")


def check_latents(content: LatentFile, config: CogVideoXConfig, kind: Kind) -> None:
    """SettingError unless these latents are of that kind and of such a model."""
    vae, shape = config.vae, tuple(content.latents.shape)
    if content.kind != kind:
        use = {"clean": "decode reads them", "noise": "generate --latents_path reads them"}[content.kind]
        raise SettingError(f"these latents are {content.kind}, not {kind}: {use}")
    if shape[1] != vae.latent_channels:
        raise SettingError(f"the latents have {shape[1]} channels, the model's VAE {vae.latent_channels}")
    if abs(content.scaling_factor - vae.scaling_factor) > 1e-6 * vae.scaling_factor:
        got, wanted = content.scaling_factor, vae.scaling_factor
        raise SettingError(f"the latents are scaled by {got:g}, the model's by {wanted:g}: another model's")
    size = (shape[2] * vae.space_factor, shape[3] * vae.space_factor)
    if size != (content.height, content.width):
        told = f"{content.height}x{content.width}"
        raise SettingError(f"latents of {size[0]}x{size[1]} pixels, but the file says {told}")
