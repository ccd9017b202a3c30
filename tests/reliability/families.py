"""Both families with tiny models on disk, their nets damaged on request. Not a test file."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from shared.checkpoints import load_tensors, save_tensors

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle moving left"


@dataclass(frozen=True)
class Family:
    """A family's program and a model folder in its own layout: NET.safetensors for each net."""

    package: str
    model: Path
    nets: tuple[str, ...]
    last: str  # the layer of the codec that makes pixels, as CODEC.LAYER

    def main(self, *words: object) -> int:
        """In this process; returns the exit code."""
        try:
            return importlib.import_module(f"{self.package}.__main__").main([str(word) for word in words])
        except SystemExit as ended:
            return int(ended.code or 0)

    def generate(self, output: Path, *words: object, model: Path | None = None) -> int:
        return self.main(
            "generate", "--prompt", PROMPT, "--model_path", model or self.model, "--output_path", output,
            "--device", "cpu", "--quiet", *words,
        )  # fmt: skip

    def damaged(self, folder: Path, net: str, change: Callable[[dict[str, Tensor]], object]) -> Path:
        """A copy of the model in which `change` was done to a net's tensors."""
        shutil.copytree(self.model, folder)
        path = folder / f"{net}.safetensors"
        tensors = {name: x.clone() for name, x in load_tensors(path).items()}
        change(tensors)
        save_tensors(tensors, path)
        return folder


def cogvideo(folder: Path) -> Family:
    from cogvideo_ar.parts import save_parts
    from tests.cogvideo_ar.tiny_pipeline import tiny_parts

    model = save_parts(tiny_parts(folder), folder / "model")
    return Family("cogvideo_ar", model, ("keyframes", "interpolation", "vqvae"), "vqvae.decoders.8.conv_out")


def cogvideox(folder: Path) -> Family:
    from tests.cogvideox_diff.tiny_pipeline import make, write_tokenizer

    model = make("2b", write_tokenizer(folder / "words")).save_pretrained(folder / "model")
    return Family(
        "cogvideox_diff", model, ("text_encoder", "transformer", "vae"), "vae.decoder.conv_out.conv"
    )


def sidecar(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


@cache
def example(name: str) -> ModuleType:
    """A script of the folder examples as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
