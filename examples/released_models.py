"""The released models at full size, built without memory: the five of CogVideoX and the parts of CogVideo;
parameters of each part, and how far their names and shapes are from recorded manifests of the released
checkpoints, in both directions.

Run: python examples/released_models.py [--cases tests/parity/cases]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_ar.checkpoints import ICETK_VQVAE, SAT_DSR, SAT_ITERSR, SAT_STAGE
from cogvideo_ar.config import cogvideo, cogview2_dsr, cogview2_itersr
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideo_ar.vqvae import VQVAE
from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER, DIFFUSERS_VAE
from cogvideox_diff.config import PRESETS
from cogvideox_diff.memory import meta_nets
from shared.checkpoints import Table, convert, invert
from shared.model_folder import without_memory

RELEASED = {
    "cogvideox-2b": "CogVideoX-2b",
    "cogvideox-5b": "CogVideoX-5b",
    "cogvideox-5b-i2v": "CogVideoX-5b-I2V",
    "cogvideox-1.5-5b": "CogVideoX1.5-5B",
    "cogvideox-1.5-5b-i2v": "CogVideoX1.5-5B-I2V",
}
CASES = Path(__file__).parent.parent / "tests/parity/cases"
Shapes = dict[str, list[int]]


def count(tensors: dict[str, Tensor]) -> int:
    return sum(x.numel() for x in tensors.values())


def differences(ours: dict[str, Tensor], manifest: Path, table: Table) -> tuple[int, int]:
    """Tensors (name, shape and type) that differ: ours written in the released form, and the other way."""
    content = json.loads(manifest.read_text(encoding="utf-8"))
    dtype = getattr(torch, content.get("dtype", "float32"))
    entries = content["tensors"].items()
    theirs = {name: torch.empty(shape, device="meta", dtype=dtype) for name, shape in entries}
    ours = {name: x.to(dtype) for name, x in ours.items()}
    return both_ways(ours, theirs, table)


def both_ways(ours: dict[str, Tensor], theirs: dict[str, Tensor], table: Table) -> tuple[int, int]:
    """Tensors that differ when ours are written in the released form, and when the released are read."""
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
        cells = [spaced(n) for n in (*numbers, sum(numbers))]
        lines.append(f"| {released} | {' | '.join(cells)} | {wrong[0]}, {wrong[1]} |")
    return lines


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


# ---- CogVideo


def cogvideo_manifests(cases: Path) -> dict[str, Shapes]:
    """Names and shapes of the five released parts."""
    stages = json.loads((cases / "cogvideo_ar/full_size_manifest.json").read_text(encoding="utf-8"))
    fine = json.loads((cases / "cogview2_sr/full_manifest.json").read_text(encoding="utf-8"))
    codec = json.loads((cases / "icetk/vqvae_full_manifest.json").read_text(encoding="utf-8"))
    return {
        "stage 1": stages["parameters"],
        "stage 2": stages["parameters"],
        "DSR": _every_layer(fine["cogview2-dsr"]),
        "IterSR": _every_layer(fine["cogview2-itersr"]),
        "VQVAE": {entry["name"]: entry["shape"] for entry in codec["entries"]},
    }


def _every_layer(facts: dict[str, Any]) -> Shapes:
    first, last = facts["layer_index_range"]
    layers = range(first, last + 1)
    each = {name.format(i=i): shape for i in layers for name, shape in facts["per_layer"].items()}
    return facts["other"] | each


def cogvideo_nets() -> dict[str, tuple[nn.Module, Table]]:
    """The parts without memory, each with the table of its released form."""
    config = cogvideo()
    makers: dict[str, tuple[Callable[[], nn.Module], Table]] = {
        "stage 1": (lambda: CogVideoTransformer(config.keyframes), SAT_STAGE),
        "stage 2": (lambda: CogVideoTransformer(config.interpolation), SAT_STAGE),
        "DSR": (lambda: SuperResolutionTransformer(cogview2_dsr()), SAT_DSR),
        "IterSR": (lambda: SuperResolutionTransformer(cogview2_itersr()), SAT_ITERSR),
        "VQVAE": (lambda: VQVAE(config.vqvae), ICETK_VQVAE),
    }
    with without_memory():
        return {name: (make(), table) for name, (make, table) in makers.items()}


def cogvideo_table(cases: Path) -> list[str]:
    """Lines of a Markdown table; stage 2 shares the base channel of stage 1, so it counts once in the sum."""
    lines = [
        "| part | base channel | temporal channel | all | differences (write, read) |",
        "|---|" + "---:|" * 4,
    ]
    manifests, total = cogvideo_manifests(cases), 0
    for name, (net, table) in cogvideo_nets().items():
        whole = sum(x.numel() for x in net.parameters())
        dual = isinstance(net, CogVideoTransformer)
        own = sum(x.numel() for _, x in net.temporal_parameters()) if dual else 0
        theirs = {key: torch.empty(shape, device="meta") for key, shape in manifests[name].items()}
        wrong = both_ways({key: x.float() for key, x in net.state_dict().items()}, theirs, table)
        parts = (spaced(whole - own), spaced(own)) if dual else ("", "")
        lines.append(f"| {' | '.join([name, *parts, spaced(whole)])} | {wrong[0]}, {wrong[1]} |")
        total += own if name == "stage 2" else whole
    return [*lines, f"| stored, the shared base channel once | | | {spaced(total)} | |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, default=CASES)
    cases = parser.parse_args().cases
    print("\n".join([*table(cases / "cogvideox/manifests"), "", *cogvideo_table(cases)]))


if __name__ == "__main__":
    main()
