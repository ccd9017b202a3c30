"""One training step (forward, backward, AdamW) of our transformer against one of diffusers': same weights.

Both nets are given the same weights, inputs and noise; steps are taken in turn, so that what else the machine
does falls on both. CPU seconds of one thread, medians; the losses of the first step are compared as well.
Needs diffusers (extra `peers`).
Run: python examples/training_throughput.py [--heads 8] [--layers 4] [--repeats 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER
from cogvideox_diff.config import ScheduleConfig, TransformerConfig
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.training.objective import diffusion_loss
from cogvideox_diff.transformer import ExpertTransformer
from shared.checkpoints import convert, load_into

FRAMES, ROWS, COLUMNS, CHANNELS, TEXT_LEN, TEXT_DIM = 5, 16, 16, 16, 32, 256


def nets(heads: int, layers: int) -> tuple[nn.Module, ExpertTransformer]:
    """diffusers' 2B architecture at this size, and ours with its weights."""
    import diffusers

    torch.manual_seed(0)
    peer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=64, in_channels=CHANNELS, out_channels=CHANNELS,
        text_embed_dim=TEXT_DIM, num_layers=layers, sample_height=ROWS, sample_width=COLUMNS,
        sample_frames=4 * FRAMES - 3, max_text_seq_length=TEXT_LEN,
    )  # fmt: skip
    config = TransformerConfig(
        num_layers=layers, num_heads=heads, head_dim=64, in_channels=CHANNELS, out_channels=CHANNELS,
        sample_size=(FRAMES, ROWS, COLUMNS), text_dim=TEXT_DIM, text_len=TEXT_LEN,
    )  # fmt: skip
    own = load_into(ExpertTransformer(config), convert(peer.state_dict(), DIFFUSERS_TRANSFORMER))
    return peer.train(), own.train().requires_grad_(True)  # type: ignore[return-value]


def step_of(call: Callable[..., Tensor], net: nn.Module, batch: dict[str, Tensor]) -> Callable[[], float]:
    """One update; returns its loss."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, betas=(0.9, 0.95))
    schedule = NoiseSchedule.from_config(ScheduleConfig())

    def step() -> float:
        loss = diffusion_loss(call, schedule, *batch.values()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def measured(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of every step after the first, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return seconds


def compare(heads: int, layers: int, repeats: int) -> dict[str, Any]:
    """Median seconds of both, their ratio, and how far the first losses are apart."""
    peer, own = nets(heads, layers)
    random = torch.Generator().manual_seed(1)
    shape = (1, FRAMES, CHANNELS, ROWS, COLUMNS)
    batch = {
        "x0": torch.randn(shape, generator=random),
        "text": torch.randn(1, TEXT_LEN, TEXT_DIM, generator=random),
        "timesteps": torch.tensor([500]),
        "noise": torch.randn(shape, generator=random),
    }
    steps = {
        "diffusers": step_of(lambda x, text, t, ofs: peer(x, text, t, return_dict=False)[0], peer, batch),
        "ours": step_of(own, own, batch),
    }
    first = {name: step() for name, step in steps.items()}
    seconds = {name: statistics.median(values) for name, values in measured(steps, repeats).items()}
    apart = abs(first["ours"] - first["diffusers"]) / first["diffusers"]
    return {"seconds": seconds, "ratio": seconds["ours"] / seconds["diffusers"], "loss_apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=8, help="of 64; 8 is a width of 512")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = compare(options.heads, options.layers, options.repeats)
    tokens = TEXT_LEN + FRAMES * ROWS * COLUMNS // 4
    print(
        f"width {64 * options.heads}, {options.layers} layers, {tokens} tokens, {options.repeats} steps each"
    )
    for name, seconds in found["seconds"].items():
        print(f"  {name:10} {seconds:.3f} CPU s a step")
    print(f"ours / diffusers: {found['ratio']:.2f}; first losses apart: {found['loss_apart']:.1e}")


if __name__ == "__main__":
    main()
