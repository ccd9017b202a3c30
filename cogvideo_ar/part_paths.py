"""Parts of a model that do not lie in its folder: their flags and their paths."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from shared.errors import SettingError, WeightsError

LONGEST_LISTING = 200  # names of a folder that are looked at for the one that was meant


@dataclass(frozen=True, kw_only=True)
class PartPaths:
    """Where single parts lie; None: in the model's folder.

    A net is a file or a folder of this project (`keyframes.safetensors`, or the model folder that has it) or
    a released one (a SAT checkpoint's folder, `ice_image.pt`).
    """

    stage1_path: Path | None = None
    stage2_path: Path | None = None
    codec_path: Path | None = None
    text_model_path: Path | None = None
    super_resolution_path: Path | None = None
    refinement_path: Path | None = None

    @property
    def given(self) -> dict[str, Path]:
        """The paths that are not None, by field."""
        return {name: path for name in NAMES if (path := getattr(self, name)) is not None}

    @property
    def marked(self) -> dict[str, Path]:
        """The same; of a file in a model folder the folder, whose config.json belongs to it."""
        return {
            name: path.parent if path.is_file() and (path.parent / "config.json").is_file() else path
            for name, path in self.given.items()
        }

    def check(self) -> None:
        """WeightsError for a path that is not there, with the most similar one that is."""
        for name, path in self.given.items():
            if not path.exists():
                raise WeightsError(f"--{name}: there is no {path}{_nearest(path)}")


NONE = PartPaths()
NAMES = tuple(field.name for field in fields(PartPaths))
WHOLE = NAMES[:4]  # with all of these, released parts need no folder
WORDS = {
    "stage1_path": "the key frames' transformer: a SAT checkpoint or keyframes.safetensors",
    "stage2_path": "the interpolation's: a SAT checkpoint or interpolation.safetensors",
    "codec_path": "the image codec: ice_image.pt or vqvae.safetensors",
    "text_model_path": "the text model: ice_text.model",
    "super_resolution_path": "CogView2's DSR: a SAT checkpoint or super_resolution.safetensors",
    "refinement_path": "CogView2's IterSR: a SAT checkpoint or refinement.safetensors",
}


def add_part_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every part."""
    for name in NAMES:
        parser.add_argument(f"--{name}", type=Path, help=f"{WORDS[name]} (default: in --model_path)")


def chosen_parts(options: argparse.Namespace) -> PartPaths:
    """What the flags say."""
    return PartPaths(**{name: getattr(options, name) for name in NAMES})


def refuse_parts(options: argparse.Namespace, why: str) -> None:
    """SettingError if any flag is used."""
    if given := chosen_parts(options).given:
        raise SettingError(f"{', '.join('--' + name for name in given)}: {why}")


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor a folder {folder})"
    names = [entry.name for _, entry in zip(range(LONGEST_LISTING), sorted(folder.iterdir()), strict=False)]
    close = get_close_matches(path.name, names, n=1, cutoff=0.4)
    return f"; nearest: {folder / close[0]}" if close else f"; {folder} has nothing like it"
