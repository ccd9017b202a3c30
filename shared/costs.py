"""What work costs: operations, bytes and steps of every stage, and the least seconds that a device needs.

Only matrix products, attention and convolutions are counted as operations, as in `torch.utils.flop_counter`;
everything else is counted by the bytes that it moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from shared.config_cli import pick

Kind = Literal["matmul", "attention", "conv", "pointwise"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OffloadMode = Literal["none", "model", "sequential"]

RESERVE = 2**30  # the device's own libraries, and workspaces inside of operators
MARGIN = 1.1  # of what is computed: allocators round up and fall to pieces


# ---- work


@dataclass(frozen=True, kw_only=True)
class Part:
    """Work of one kind that runs at one rate: operations, and bytes read and written."""

    kind: Kind
    flops: int = 0
    moved: int = 0

    def __mul__(self, times: int) -> Part:
        return replace(self, flops=self.flops * times, moved=self.moved * times)


def linear(rows: int, inputs: int, outputs: int, size: int, *, count: int = 1) -> Part:
    """`count` matrix products of [rows, inputs] with weights [inputs, outputs]; `size` bytes per number."""
    moved = inputs * outputs + rows * (inputs + outputs)
    return Part(kind="matmul", flops=2 * rows * inputs * outputs, moved=size * moved) * count


def attention(queries: int, keys: int, width: int, size: int, *, batch: int = 1) -> Part:
    """Softmax attention of all heads together (`width` = heads x head size) by a kernel that keeps the scores
    to itself; masked scores are computed like others."""
    moved = 2 * size * width * (queries + keys)
    return Part(kind="attention", flops=4 * queries * keys * width, moved=moved) * batch


def convolution(places: int, inputs: int, outputs: int, taps: int, size: int) -> Part:
    """A convolution of kernels of `taps` places, with `places` outputs over batch, time and space."""
    moved = inputs * outputs * taps + places * (inputs + outputs)
    return Part(kind="conv", flops=2 * places * inputs * outputs * taps, moved=size * moved)


def pointwise(values: int, passes: float, size: int) -> Part:
    """Norms, activations, sums and copies: `passes` readings or writings of so many numbers."""
    return Part(kind="pointwise", moved=round(values * passes) * size)


def total_flops(parts: Iterable[Part]) -> int:
    return sum(part.flops for part in parts)


def total_moved(parts: Iterable[Part]) -> int:
    return sum(part.moved for part in parts)


def repeated(parts: Iterable[Part], times: int) -> tuple[Part, ...]:
    """The same work so many times over."""
    return tuple(part * times for part in parts)


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage of making a video; `steps` run one after the other.

    Bytes: `weights` of its net, `streamed` of them at once where blocks take turns on the device, `cache` of
    keys and values, `work` the most that everything else holds at once. `shared` bytes of the weights belong
    to an earlier stage's net too and are stored once.
    """

    name: str
    net: str
    unit: str
    steps: int
    parts: tuple[Part, ...]
    weights: int
    streamed: int
    cache: int = 0
    work: int = 0
    shared: int = 0
    forwards: int = 1  # runs of the net: how often sequential offloading copies its weights

    @property
    def flops(self) -> int:
        return total_flops(self.parts)

    @property
    def moved(self) -> int:
        return total_moved(self.parts)

    def peak(self, mode: OffloadMode, all_weights: int) -> int:
        """Bytes on the device, with a margin for what allocators lose."""
        weights = {"none": all_weights, "model": self.weights, "sequential": self.streamed}[mode]
        return weights + self.cache + int(self.work * MARGIN) + RESERVE

    def copied(self, mode: OffloadMode) -> int:
        """Weight bytes that go to the device in this stage."""
        return {"none": 0, "model": self.weights, "sequential": self.weights * self.forwards}[mode]


def stored_weights(stages: Sequence[StageCost]) -> int:
    """Bytes of all different nets."""
    nets = {stage.net: stage.weights - stage.shared for stage in reversed(stages)}
    return sum(nets.values())


def most_memory(stages: Sequence[StageCost], mode: OffloadMode) -> tuple[int, StageCost]:
    """The peak of a run, and the stage that has it."""
    whole = stored_weights(stages)
    worst = max(stages, key=lambda stage: stage.peak(mode, whole))
    return worst.peak(mode, whole), worst


# ---- devices


# Shares of the nominal figures that good kernels reach.
MATMUL_SHARE = 0.80  # 790 of 989 TFLOP/s, H200, bfloat16
STREAM_SHARE = 0.74  # 4.3 of 4.8 TB/s can be had (H200); gpt-fast's decoding has 0.82 of such a figure (A100)
CONV_SHARE = 0.50  # assumed: no figure of our own on a GPU
HOPPER_ATTENTION_SHARE = 0.42  # head size 64: cuDNN 413 of 989 TFLOP/s (figure of the FlashAttention-3 paper)
ATTENTION_SHARE = 0.50  # older devices: what CogVideoX-5B's published 180 s on an A100 leaves for it
LINK = 25e9  # bytes/s from the CPU's memory: PCIe 4.0 x16, of 32 nominal
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """`half` and `single` are nominal dense FLOP/s of 16-bit (with 32-bit sums) and 32-bit matrix products,
    `bandwidth` nominal bytes/s, `memory` the bytes that programs can have."""

    name: str
    memory: int
    bandwidth: float
    half: float
    single: float
    attention_share: float = ATTENTION_SHARE
    matmul_share: float = MATMUL_SHARE
    conv_share: float = CONV_SHARE
    stream_share: float = STREAM_SHARE
    link: float = LINK

    def rate(self, kind: Kind, dtype: torch.dtype) -> float:
        """Operations per second that are reached."""
        nominal = self.half if dtype.itemsize == 2 else self.single * 4 / dtype.itemsize
        shares = {"attention": self.attention_share, "conv": self.conv_share}
        return nominal * shares.get(kind, self.matmul_share)

    def seconds(self, parts: Iterable[Part], dtype: torch.dtype) -> float:
        """The roofline: every part takes the longer of computing and moving. Starting kernels, drawing tokens
        and Python are not in it."""
        speed = self.bandwidth * self.stream_share
        return sum(max(part.flops / self.rate(part.kind, dtype), part.moved / speed) for part in parts)

    def stage_seconds(self, stage: StageCost, dtype: torch.dtype, mode: OffloadMode = "none") -> float:
        """With the copying of weights that waits for nothing else, as offloading needs it."""
        return self.seconds(stage.parts, dtype) + stage.copied(mode) / self.link


def cpu_device(gflops: float, gbytes: float, memory: int, *, half_gflops: float | None = None) -> Device:
    """A CPU by measured figures: GFLOP/s of float32 (and 16-bit) matrix products, GB/s of copying."""
    return Device(
        name="cpu",
        memory=memory,
        bandwidth=gbytes * 1e9,
        half=(gflops if half_gflops is None else half_gflops) * 1e9,
        single=gflops * 1e9,
        attention_share=0.85,  # 84 of 96 GFLOP/s in float32
        matmul_share=1.0,
        conv_share=1.0,  # 117 of 96 GFLOP/s
        stream_share=0.75,  # 23.6 of 31 GB/s by a float32 matrix-vector product
        link=float("inf"),
    )


CPU_GFLOPS, CPU_GBYTES = 96.0, 31.0  # one thread of a Zen 4 core, measured


def _gpu(name: str, gib: float, terabytes: float, half: float, single: float, attention: float) -> Device:
    return Device(
        name=name,
        memory=int(gib * GIB),
        bandwidth=terabytes * 1e12,
        half=half * 1e12,
        single=single * 1e12,
        attention_share=attention,
    )


# Data sheets: dense figures, and memory as drivers give it to programs.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("h200", 139.8, 4.8, 989.5, 67, HOPPER_ATTENTION_SHARE),
        _gpu("h100", 79.1, 3.35, 989.5, 67, HOPPER_ATTENTION_SHARE),
        _gpu("a100-80", 79.1, 2.039, 312, 19.5, ATTENTION_SHARE),
        _gpu("a100-40", 39.4, 1.555, 312, 19.5, ATTENTION_SHARE),
        _gpu("rtx4090", 23.5, 1.008, 165.2, 82.6, ATTENTION_SHARE),
        _gpu("rtx3090", 23.5, 0.936, 71, 35.6, ATTENTION_SHARE),
        _gpu("l4", 22.0, 0.3, 121, 30.3, ATTENTION_SHARE),
    )
}


def find_device(name: str) -> Device:
    """A device of the table. SettingError lists the legal names and the nearest."""
    return pick("device", name.lower(), {**DEVICES, "auto": None, "cpu": None}) or _present(name)


def _present(name: str) -> Device:
    """The first GPU of this machine ("auto" only) or its CPU, with what is free there."""
    from shared.memory import free_bytes

    if name.lower() == "auto" and torch.cuda.is_available():
        free = free_bytes(torch.device("cuda", 0)) or 0
        return replace(_by_product(torch.cuda.get_device_name(0), free), memory=free)
    free = free_bytes(torch.device("cpu")) or 8 * GIB
    return cpu_device(CPU_GFLOPS, CPU_GBYTES, free, half_gflops=215.0)


def _by_product(product: str, memory: int) -> Device:
    """The table's device that a driver's name means; the slowest of the table where it means none."""
    words = product.lower().replace(" ", "").replace("geforce", "")
    found = [device for device in DEVICES.values() if device.name.partition("-")[0] in words]
    nearest = min(found, key=lambda device: abs(device.memory - memory), default=None)
    return nearest or replace(DEVICES["l4"], name=product)
