"""Model folders that can be read, told apart by their content: our own, and one with the released parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cogvideo_ar.clusters import FILE as CLUSTERS
from cogvideo_ar.config import CogVideoConfig
from cogvideo_ar.parts import DEMO, FAMILY, Parts, load_parts, own_dtype, read_config, save_parts
from cogvideo_ar.sat_export import save_sat
from cogvideo_ar.sat_layout import SatFolder, is_sat
from shared.checkpoints import load_tensors
from shared.errors import OutputPathError, WeightsError
from shared.model_folder import find_model, needed


@dataclass(frozen=True)
class OwnFolder:
    """A folder that `save_parts` wrote: as of a `SatFolder`, what is known before its weights are read."""

    path: Path

    @cached_property
    def config(self) -> CogVideoConfig:
        return read_config(self.path)

    @property
    def dtype(self) -> torch.dtype:
        """To run in, unless another is asked for."""
        return own_dtype(self.path)

    @property
    def clusters(self) -> Path | None:
        """The table of token clusters, if there is one."""
        return self.clusters_target if self.clusters_target.is_file() else None

    @property
    def clusters_target(self) -> Path:
        """Where a table of token clusters belongs."""
        return self.path / CLUSTERS

    def codebook(self) -> Tensor:
        """The image codec's codes [V, D], float32."""
        return load_tensors(needed(self.path / "vqvae.safetensors"))["quantizer.codebook"].float()

    def load(self, dtype: torch.dtype, device: torch.device) -> Parts:
        return load_parts(self.path, dtype, device)


ModelFolder = OwnFolder | SatFolder


def open_folder(source: str | Path) -> ModelFolder:
    """The folder that `source` ("demo" or a path) stands for. WeightsError says what is missing."""
    if str(source) != "demo" and is_sat(Path(source)):
        return SatFolder(Path(source))
    return OwnFolder(find_model(source, demo=DEMO, family=FAMILY))


def convert_folder(
    source: str | Path,
    target: str | Path,
    *,
    stage1_path: Path | None = None,
    stage2_path: Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the released parts in `source` as a folder of our own; `dtype` is that of the stored weights
    (default: as the transformers are, float32 for the codec). The paths name the checkpoints of the stages
    where `source` does not tell them apart.

    Raises WeightsError for parts that are missing or do not fit, OutputPathError where a model is there.
    """
    source, target = Path(source), Path(target)
    if (target / "config.json").exists() and not overwrite:
        raise OutputPathError(f"{target} already holds a model; choose another folder or allow --overwrite")
    if not source.is_dir():
        raise WeightsError(f"there is no folder {source}")
    if (source / "config.json").is_file():
        raise WeightsError(f"{source} has a config.json: there is nothing to convert")
    folder = SatFolder(source, stage1_path, stage2_path)
    return save_parts(folder.load(folder.dtype, torch.device("cpu")), target, dtype)


def export_folder(
    source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Path:
    """The way back: write a model as a folder with the released parts. SettingError for a model with settings
    that these cannot express, OutputPathError where checkpoints are there."""
    target, folder = Path(target), open_folder(source)
    if is_sat(target) and not overwrite:
        raise OutputPathError(f"{target} already holds checkpoints; choose another or allow --overwrite")
    return save_sat(folder.load(folder.dtype, torch.device("cpu")), target, dtype)
