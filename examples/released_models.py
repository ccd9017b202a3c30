"""The five released CogVideoX models at full size, built without memory: parameters of each part, and how far
their names and shapes are from recorded manifests of the released checkpoints, in both directions.

Run: python examples/released_models.py [--manifests tests/parity/cases/cogvideox/manifests]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER, DIFFUSERS_VAE
from cogvideox_diff.config import PRESETS
from cogvideox_diff.memory import meta_nets
from shared.checkpoints import Table, convert, invert

RELEASED = {
    "cogvideox-2b": "CogVideoX-2b",
    "cogvideox-5b": "CogVideoX-5b",
    "cogvideox-5b-i2v": "CogVideoX-5b-I2V",
    "cogvideox-1.5-5b": "CogVideoX1.5-5B",
    "cogvideox-1.5-5b-i2v": "CogVideoX1.5-5B-I2V",
}
MANIFESTS = Path(__file__).parent.parent / "tests/parity/cases/cogvideox/manifests"


def count(tensors: dict[str, Tensor]) -> int:
    return sum(x.numel() for x in tensors.values())


def differences(ours: dict[str, Tensor], manifest: Path, table: Table) -> tuple[int, int]:
    """Tensors (name, shape and type) that differ: ours written in the released form, and the other way."""
    content = json.loads(manifest.read_text(encoding="utf-8"))
    dtype = getattr(torch, content.get("dtype", "float32"))
    entries = content["tensors"].items()
    theirs = {name: torch.empty(shape, device="meta", dtype=dtype) for name, shape in entries}
    ours = {name: x.to(dtype) for name, x in ours.items()}
    there, back = invert(ours, table), convert(theirs, table)
    return len(_kinds(there) ^ _kinds(theirs)), len(_kinds(back) ^ _kinds(ours))


def _kinds(tensors: dict[str, Tensor]) -> set[tuple[str, tuple[int, ...], torch.dtype]]:
    return {(name, tuple(x.shape), x.dtype) for name, x in tensors.items()}


def table(manifests: Path) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| model | transformer | VAE | T5 encoder | all | differences (write, read) |",
        "|---|" + "---:|" * 5,
    ]
    for preset, released in RELEASED.items():
        nets = meta_nets(PRESETS[preset]())
        tied = {
            n: x
            for n, x in nets["text_encoder"].state_dict().items()
            if not n.endswith("embed_tokens.weight")
        }
        states = [nets["transformer"].state_dict(), nets["vae"].state_dict(), tied]
        pairs = (
            (states[0], manifests / f"{released}.transformer.json", DIFFUSERS_TRANSFORMER),
            (states[1], manifests / "vae.json", DIFFUSERS_VAE),
        )
        wrong = [sum(kind) for kind in zip(*(differences(*pair) for pair in pairs), strict=True)]
        numbers = [count(state) for state in states]
        cells = [f"{n:,}".replace(",", " ") for n in (*numbers, sum(numbers))]
        lines.append(f"| {released} | {' | '.join(cells)} | {wrong[0]}, {wrong[1]} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifests", type=Path, default=MANIFESTS)
    print("\n".join(table(parser.parse_args().manifests)))


if __name__ == "__main__":
    main()
