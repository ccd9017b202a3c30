"""The user's files: which there can be, where they lie, their checksums. A missing one skips its metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from benchmarks.metrics import METRICS, Metric, digest
from shared.config_cli import pick
from shared.errors import SettingError

KINDS = {
    "i3d": "I3D of StyleGAN-V as TorchScript (i3d_torchscript.pt)",
    "i3d_400": "I3D with the weights i3d_pretrained_400.pt, scripted: [B, 3, T, 224, 224] to [B, 400]",
    "c3d": "C3D fine-tuned on UCF-101 as TorchScript (c3d_ucf101.pt)",
    "clip": "a CLIP folder that transformers reads (config, weights, tokenizer, preprocessor_config.json)",
    "lpips": "LPIPS as TorchScript (frames, frames) to distances, or AlexNet-LPIPS weights as safetensors",
    "features": "a net of your own: TorchScript [1, 3, T, H, W] to [1, D], or 3D convolutions as safetensors",
}


@dataclass(frozen=True, kw_only=True)
class FeatureFiles:
    """Paths by kind."""

    paths: Mapping[str, Path] = field(default_factory=dict)

    @staticmethod
    def parse(words: Iterable[str]) -> FeatureFiles:
        """From `KIND=PATH` words; SettingError for another form, an unknown kind or one given twice."""
        paths: dict[str, Path] = {}
        for word in words:
            kind, equals, path = word.partition("=")
            if not equals or not path:
                raise SettingError(f"a feature file is KIND=PATH, got {word!r}; kinds: {', '.join(KINDS)}")
            pick("feature file", kind, {name: name for name in KINDS})
            if kind in paths:
                raise SettingError(f"feature file {kind!r} is given twice")
            paths[kind] = Path(path)
        return FeatureFiles(paths=paths)

    def path(self, kind: str) -> Path | None:
        """Where the file is, or None if it was not given or is not there."""
        path = self.paths.get(kind)
        return path if path is not None and path.exists() else None

    def sha256(self, kind: str) -> str:
        """Of the file, or of a folder's files and their names; "" without one."""
        path = self.path(kind)
        return "" if path is None else _sha256(path.resolve(), _stamp(path))

    def metrics(self) -> dict[str, Metric]:
        """Every metric; those that need a file that is there carry its checksum in their recipe."""
        return {
            name: metric.with_file(self.sha256(metric.needs)) if self.path(metric.needs) else metric
            for name, metric in METRICS.items()
        }

    def skipped(self) -> dict[str, str]:
        """Metric -> why it cannot be measured."""
        found: dict[str, str] = {}
        for name, metric in METRICS.items():
            if metric.needs and self.path(metric.needs) is None:
                given = self.paths.get(metric.needs)
                missing = "" if given is None else f"; {given} is not there"
                found[name] = (
                    f"skipped: needs --feature_files {metric.needs}=PATH, {KINDS[metric.needs]}{missing}"
                )
        return found


def _stamp(path: Path) -> str:
    """Changes when the file does."""
    return digest([[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in _members(path)])


def _members(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


@lru_cache(maxsize=64)
def _sha256(path: Path, stamp: str) -> str:
    hashes = {}
    for member in _members(path):
        with member.open("rb") as file:
            name = str(member.relative_to(path))
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes["."] if path.is_file() else digest(hashes)
