"""What one block of the released CogVideo costs on this machine: time, arithmetic and bytes.

One transformer block at the released sizes (hidden 3072, 48 heads, 20 x 20 slots a frame) with random weights
runs the prefill of a stage and the cached step of its last slot. A step reads every weight for one slot per
row, so memory bounds it: the bytes that it must read, over the bandwidth measured here, are its floor. Shares
and rates go by processor time per thread, which other programs disturb less than the clock.
Run: python examples/block_arithmetic.py [--stage keyframes] [--dtype float32] [--rows 1] [--threads 2]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, process_time

import torch
from torch import Tensor

from cogvideo_ar.attention import FullAttention
from cogvideo_ar.config import PRESETS, TransformerConfig
from cogvideo_ar.layout import SequenceLayout, interpolation_layout, keyframe_layout
from cogvideo_ar.slot_attention import SlotAttention
from cogvideo_ar.transformer import Block, DualChannelAttention, layer_cache

LAYOUTS = {"keyframes": keyframe_layout, "interpolation": interpolation_layout}


@dataclass(frozen=True)
class Time:
    """Seconds of the fastest run: by the clock, and of this process's processor time per thread."""

    clock: float
    busy: float


def fastest(work: Callable[[], object], repeats: int) -> Time:
    """After one run that does not count."""
    work()
    clock, busy = [], []
    for _ in range(repeats):
        start = perf_counter(), process_time()
        work()
        clock.append(perf_counter() - start[0])
        busy.append((process_time() - start[1]) / torch.get_num_threads())
    return Time(min(clock), min(busy))


def bandwidth() -> float:
    """Bytes per second of reading memory that no cache holds."""
    data = torch.ones(1 << 27)  # 512 MiB
    return data.nbytes / fastest(data.sum, 5).busy


@dataclass(frozen=True, kw_only=True)
class Cost:
    time: Time
    flops: float
    num_bytes: float  # that must be read

    def line(self, name: str, bytes_per_second: float) -> str:
        floor = self.num_bytes / bytes_per_second
        return (
            f"  {name:8}{1e3 * self.time.clock:8.1f} ms (busy {1e3 * self.time.busy:.1f}), "
            f"{self.flops / 1e9:.2f} GFLOP, {self.flops / self.time.busy / 1e9:.1f} GFLOP/s, "
            f"{self.num_bytes / 1e6:.0f} MB: floor {1e3 * floor:.1f} ms, {floor / self.time.busy:.0%} of it"
        )


class Bench:
    """One block, its cache, and both ways of running it."""

    def __init__(
        self, config: TransformerConfig, layout: SequenceLayout, rows: int, dtype: torch.dtype
    ) -> None:
        self.layout, self.hidden = layout, config.hidden_size
        self.block = Block(config, DualChannelAttention(config, layer=0)).eval().to(dtype)
        self.prefix = layout.prefix(layout.num_given)
        self.x_BLC = torch.randn(rows, self.prefix.length, self.hidden).to(dtype)
        self.x_B1C = torch.randn(rows, 1, self.hidden).to(dtype)
        self.cache = layer_cache(config, layout, 0, self.x_BLC)
        for cache in (self.cache.temporal, self.cache.spatial):
            cache.keys.normal_()  # frames between the prefill and the last slot
            cache.values.normal_()
        reach = {"window": config.window, "extent": config.extent, "like": self.x_BLC}
        self.whole, self.step = FullAttention(self.prefix, **reach), SlotAttention(layout, **reach)
        self.step.aim(((layout.num_frames - 1, layout.frame_len - 1),))

    @property
    def weights(self) -> int:
        return sum(p.numel() for p in self.block.parameters())

    def run(
        self, x: Tensor, context: FullAttention | SlotAttention, pairs: int, keys: int, repeats: int
    ) -> Cost:
        """`pairs` of a query and a key per row, `keys` read from the cache per row."""
        time = fastest(lambda: self.block(x, context, self.cache), repeats)
        rows, length, _ = x.shape
        flops = 2.0 * rows * length * self.weights + 4.0 * rows * pairs * self.hidden
        read = (self.weights + 2 * rows * keys * self.hidden) * x.element_size()
        return Cost(time=time, flops=flops, num_bytes=read)

    def prefill_cost(self) -> Cost:
        """All pairs that are computed, those that a mask then hides included."""
        text, frame, plan = self.layout.text_len, self.layout.frame_len, self.whole.plans[0]
        windows = 1 if plan.slots is None else len(plan.slots)
        pairs = text * text + self.prefix.num_frames * frame * (text + frame)
        pairs += windows * sum((r.queries.stop - r.queries.start) * r.num_keys for r in plan.ranges)
        return self.run(self.x_BLC, self.whole, pairs, keys=0, repeats=2)

    def step_cost(self) -> Cost:
        looks = [*self.step.spatial_looks, *self.step.temporal_looks[0]]
        keys = sum(look.keys if isinstance(look.keys, int) else len(look.keys) for look in looks)
        return self.run(self.x_B1C, self.step, keys, keys, repeats=20)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cogvideo")
    parser.add_argument("--stage", choices=LAYOUTS, help="default: both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=1, help="sequences that share a step; guidance has 2")
    parser.add_argument("--text_len", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    preset, speed = PRESETS[options.preset](), bandwidth()
    print(
        f"{options.dtype}, {options.rows} row(s), {options.threads} thread(s), memory {speed / 1e9:.1f} GB/s"
    )
    for stage in [options.stage] if options.stage else LAYOUTS:
        config: TransformerConfig = getattr(preset, stage)
        layout = LAYOUTS[stage](config, options.text_len)
        bench = Bench(config, layout, options.rows, getattr(torch, options.dtype))
        size = f"hidden {config.hidden_size}, {config.num_heads} heads, {bench.weights / 1e6:.1f} M weights"
        print(f"{stage}: {size}")
        print(bench.prefill_cost().line("prefill", speed))
        step = bench.step_cost()
        print(step.line("step", speed))
        print(f"  {config.num_layers} blocks: {config.num_layers * step.time.busy:.2f} s a step")


if __name__ == "__main__":
    main()
