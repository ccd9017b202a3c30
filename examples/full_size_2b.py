"""CogVideoX-2B at full size on a CPU: what loading costs, and one denoising step of the smallest legal video.

The weights are random: the checkpoint (bfloat16, diffusers layout, sharded) is written here, read through the
same code as a released one by a process of its own, and deleted. Its transformer and VAE have the released
sizes; the text encoder is a stand-in of one narrow layer, not T5-XXL. Needs 4 GB of disk and 6 GB of memory.

Run: python examples/full_size_2b.py [--folder /tmp] [--dtype float32]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.config import CogVideoXConfig, T5Config, cogvideox_2b
from cogvideox_diff.formats import DEMOS
from cogvideox_diff.model_files import PARTS, Part, empty_net, write_model
from cogvideox_diff.planning import CallSettings
from shared.memory import in_words, peak_resident_bytes
from shared.offload import Weights
from shared.protocol import GenerationRequest

SMALLEST = CallSettings(num_frames=1, height=16, width=16, num_inference_steps=1)


def stand_in_config() -> CogVideoXConfig:
    """2B, but for its text encoder."""
    text = T5Config(vocab_size=192, d_kv=64, d_ff=64, num_layers=1, num_heads=1)
    return replace(cogvideox_2b(), text=text)


def random_weights(part: Part, config: CogVideoXConfig) -> dict[str, Tensor]:
    """bfloat16, normal with deviation 0.02; norms are ones."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, x in empty_net(part, config).state_dict().items():
        tensors[name] = torch.empty(x.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=random)
        if "norm" in name and x.ndim == 1 and name.endswith("weight"):
            tensors[name].fill_(1)
    return tensors


def write(folder: Path) -> int:
    """Write the checkpoint; returns the bytes of its weight files."""
    config, tokenizer = stand_in_config(), DEMOS["demo"] / "tokenizer"
    write_model(
        folder,
        "diffusers",
        config,
        lambda part: random_weights(part, config),
        tokenizer,
        run="bfloat16",
        shard_bytes=2**30,
    )
    return sum(file.stat().st_size for part in PARTS for file in (folder / part).glob("*.safetensors"))


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """In a fresh process: load, look at every weight, make one step, decode it."""
    for part in PARTS:
        empty_net(part, stand_in_config())  # imports what nets need, so that it does not count as loading
    base, begin = peak_resident_bytes(), time.perf_counter()
    pipeline = CogVideoXPipeline.from_pretrained(folder, dtype=dtype, device="cpu")
    loading = time.perf_counter() - begin
    nets = [getattr(pipeline.parts, part) for part in PARTS]
    checksum = sum(float(x.sum()) for net in nets for x in net.parameters())  # brings every page to memory
    loaded, weights = peak_resident_bytes() - base, Weights.of(nets).nbytes
    result = pipeline.generate(GenerationRequest(prompt="a red circle"), SMALLEST)
    return {
        "weights": weights,
        "loaded": loaded,
        "ratio": loaded / weights,
        "loading_seconds": loading,
        "checksum": checksum,
        "base": base,
        "peak": peak_resident_bytes(),
        **{f"{name}_seconds": stage.seconds for name, stage in result.stages.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--dtype", default="bfloat16", help="to load in; the files hold bfloat16")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.dtype)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="cogvideox-2b-") as folder:
        size = write(Path(folder))
        shards = len(list(Path(folder).glob("*/*.safetensors")))
        print(f"written: {in_words(size)} in {shards} files; text encoder: a stand-in, not T5-XXL")
        words = [sys.executable, __file__, "--measure", folder, "--dtype", options.dtype]
        got = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    print(f"weights in memory ({options.dtype}): {in_words(got['weights'])}")
    print(f"peak while loading: {in_words(got['loaded'])} = {got['ratio']:.3f} x the weights")
    print(f"loading: {got['loading_seconds']:.1f} s")
    size = f"{SMALLEST.num_frames} frame of {SMALLEST.height} x {SMALLEST.width}"
    print(f"one guided denoising step, {size}: {got['model_seconds']:.1f} s")
    print(f"decoding it: {got['decode_seconds']:.1f} s")
    peak, base = in_words(got["peak"]), in_words(got["base"])
    print(f"peak of the whole process: {peak}, of which Python and torch {base}")


if __name__ == "__main__":
    main()
