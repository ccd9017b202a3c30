"""Model folders that can be read, told apart by their content: our own, and one with the released parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cogvideo_ar.clusters import FILE as CLUSTERS
from cogvideo_ar.config import CogVideoConfig
from cogvideo_ar.part_files import PointedFiles, makes_a_model
from cogvideo_ar.part_paths import NONE, PartPaths
from cogvideo_ar.parts import DEMO, FAMILY, OwnFiles, Parts, load_parts, own_dtype, save_parts
from cogvideo_ar.sat_export import save_sat
from cogvideo_ar.sat_layout import SatFolder, is_sat
from shared.errors import OutputPathError, WeightsError
from shared.model_folder import combined_mark, find_model


@dataclass(frozen=True)
class OwnFolder:
    """A folder that `save_parts` wrote: as of a `SatFolder`, what is known before its weights are read."""

    path: Path
    parts: PartPaths = NONE  # those that lie elsewhere

    @cached_property
    def config(self) -> CogVideoConfig:
        return self._files.config

    @cached_property
    def _files(self) -> OwnFiles:
        return PointedFiles(self.path, self.parts) if self.parts.given else OwnFiles(self.path)

    @property
    def mark(self) -> str:
        """16 hex digits that change with the weights."""
        return combined_mark(self.path, self.parts.marked)

    def check(self) -> None:
        """WeightsError unless the parts that lie elsewhere fit; reads no weights."""
        if isinstance(self._files, PointedFiles):
            self._files.check()

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

    @property
    def text_model(self) -> Path:
        """The text model."""
        return self._files.text_model

    def codec(self) -> dict[str, Tensor]:
        """The image codec's tensors, as they are stored."""
        return self._files.read("vqvae", None, torch.device("cpu"))

    def codebook(self) -> Tensor:
        """The image codec's codes [V, D], float32."""
        return self.codec()["quantizer.codebook"].float()

    def load(self, dtype: torch.dtype, device: torch.device) -> Parts:
        return load_parts(self.path, dtype, device, self._files)


ModelFolder = OwnFolder | SatFolder


def open_folder(source: str | Path, parts: PartPaths | None = None) -> ModelFolder:
    """The folder that `source` ("demo" or a path) stands for, with `parts` that lie elsewhere; "demo" with
    all of them in their released form is these alone. WeightsError says what is missing, and what of `parts`
    is not there, is another part or does not fit, before any weights are read."""
    parts = parts or NONE
    parts.check()
    folder: ModelFolder
    if str(source) == "demo" and makes_a_model(parts):
        folder = SatFolder(None, parts)
    elif str(source) != "demo" and is_sat(Path(source)):
        folder = SatFolder(Path(source), parts)
    else:
        folder = OwnFolder(find_model(source, demo=DEMO, family=FAMILY), parts)
    if parts.given:
        folder.check()
    return folder


def convert_folder(
    source: str | Path,
    target: str | Path,
    *,
    parts: PartPaths | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the released parts in `source` as a folder of our own; `dtype` is that of the stored weights
    (default: as the transformers are, float32 for the codec). `parts` lie elsewhere, or are the stages where
    `source` does not tell them apart.

    Raises WeightsError for parts that are missing or do not fit, OutputPathError where a model is there.
    """
    source, target = Path(source), Path(target)
    if (target / "config.json").exists() and not overwrite:
        raise OutputPathError(f"{target} already holds a model; choose another folder or allow --overwrite")
    if not source.is_dir():
        raise WeightsError(f"there is no folder {source}")
    if (source / "config.json").is_file():
        raise WeightsError(f"{source} has a config.json: there is nothing to convert")
    parts = parts or NONE
    parts.check()
    folder = SatFolder(source, parts)
    folder.check()
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
