"""Dtypes, devices, seeds and the cost of stages."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from shared.errors import OutputCheckError, SettingError
from shared.protocol import StageStats

THREADS_PAY_FROM = 50_000_000  # parameters
MOST_WORKERS = 256
T = TypeVar("T")

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
SAMPLE_SECONDS = 0.005  # between two looks at the process's memory
STATM = Path("/proc/self/statm")


def parse_dtype(name: str) -> torch.dtype:
    """A torch dtype by its long or short name; SettingError lists the legal ones."""
    if not isinstance(name, str) or name not in DTYPES:
        raise SettingError(f"unknown dtype {name!r:.80}; legal: {', '.join(DTYPES)}")
    return DTYPES[name]


def spare_threads(*nets: nn.Module) -> None:
    """One thread for nets too small to share: their operators are shorter than the threads' waiting for each
    other, which on a busy machine makes them many times slower. OMP_NUM_THREADS, where set, is obeyed."""
    parameters = sum(p.numel() for net in nets for p in net.parameters())
    if parameters < THREADS_PAY_FROM and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def check_workers(count: int) -> int:
    """A number of processes beside this one; SettingError for one that would bring the machine down."""
    if not 0 <= count <= MOST_WORKERS:
        raise SettingError(f"num_workers must be 0 to {MOST_WORKERS}, got {count}")
    return count


def parse_device(name: str) -> torch.device:
    """A device by name; "auto" is the first GPU, else the CPU. SettingError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise SettingError(f"unknown device {name!r}; legal: auto, cpu, cuda, cuda:N, mps")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise SettingError("device 'mps' is not available here; legal: auto, cpu")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise SettingError(f"device {name!r} is not available: {torch.cuda.device_count()} CUDA devices here")
    return torch.device(name)


def generator(seed: int, sample: int, stream: str) -> torch.Generator:
    """The CPU random stream of one purpose in one sample, whatever the batch or the rank."""
    digest = hashlib.sha256(f"{seed}/{sample}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def check_finite(name: str, x: Tensor) -> Tensor:
    """`x` itself; OutputCheckError names `name` and counts what is NaN or infinite."""
    if torch.isfinite(x).all():
        return x
    nans, infinities = int(x.isnan().sum()), int(x.isinf().sum())
    advice = "; try bfloat16 or float32" if x.dtype == torch.float16 else ""
    kind = str(x.dtype).removeprefix("torch.")
    raise OutputCheckError(
        f"{name}: {nans} NaN and {infinities} infinite of {x.numel()} values ({kind}){advice}"
    )


@contextmanager
def finite_outputs(model: nn.Module, net: str = "") -> Iterator[None]:
    """Check every module's output within the block, so that the first bad module is named, behind the name of
    its net. It waits for the device after every module: for finding a fault, not for production."""
    front = f"{net}." if net else ""

    def check(name: str, output: object) -> None:
        for x in output if isinstance(output, tuple | list) else (output,):
            if isinstance(x, Tensor) and x.is_floating_point():
                check_finite(name, x)

    def hook(name: str):
        return lambda module, inputs, output: check(name, output)

    named = [(f"{front}{name}" if name else net or "model", part) for name, part in model.named_modules()]
    handles = [part.register_forward_hook(hook(name)) for name, part in named]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def located(model: nn.Module, run: Callable[[], T], net: str = "") -> T:
    """run(); if that finds numbers that are not finite, it runs again to name the first bad module."""
    try:
        return run()
    except OutputCheckError:
        with finite_outputs(model, net):
            run()
        raise


# ---- cost


@dataclass
class Stage:
    """A stage under way; whoever runs it counts `units`."""

    name: str
    unit: str
    units: int = 0
    peak_bytes: int = 0


class StageTimer:
    """Cost of named stages, which may nest; a name used again adds up its seconds and units.

    `peak_bytes` on CUDA is the most that tensors took at once, weights included. On the CPU it is by how much
    the process's resident memory rose above that at the stage's start, looked at every 5 ms: memory that an
    earlier stage left to the allocator and this one reuses does not show.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.stages: dict[str, StageStats] = {}
        self._active: list[Stage] = []

    @contextmanager
    def stage(self, name: str, *, unit: str = "", units: int = 0) -> Iterator[Stage]:
        """Measure the block; the yielded stage's `units` may be counted up in it."""
        stage = Stage(name=name, unit=unit, units=units)
        memory = _CudaPeak(self.device, self._active) if self.device.type == "cuda" else _ResidentPeak()
        self._active.append(stage)
        memory.start()
        begin = time.perf_counter()
        try:
            yield stage
        finally:
            memory.settle()
            seconds = time.perf_counter() - begin
            stage.peak_bytes = max(stage.peak_bytes, memory.stop())
            self._active.remove(stage)
            self._add(stage, seconds)

    def _add(self, stage: Stage, seconds: float) -> None:
        before = self.stages.get(stage.name, StageStats(seconds=0.0, peak_bytes=0))
        self.stages[stage.name] = StageStats(
            seconds=before.seconds + seconds,
            peak_bytes=max(before.peak_bytes, stage.peak_bytes),
            units=before.units + stage.units,
            unit=stage.unit or before.unit,
        )


class _ResidentPeak:
    """Rise of this process's resident memory, sampled by a thread."""

    def start(self) -> None:
        self._first = self._highest = _resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """The CPU works in step; there is nothing to wait for."""

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._highest, _resident_bytes()) - self._first

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._highest = max(self._highest, _resident_bytes())


class _CudaPeak:
    """Peak of allocated CUDA memory. There is one counter per device, so a stage notes its value for the
    stages around it before it resets it."""

    def __init__(self, device: torch.device, around: list[Stage]) -> None:
        self._device, self._around = device, around

    def start(self) -> None:
        self.settle()
        self._note()
        torch.cuda.reset_peak_memory_stats(self._device)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)

    def stop(self) -> int:
        self._note()
        return torch.cuda.max_memory_allocated(self._device)

    def _note(self) -> None:
        for stage in self._around:
            stage.peak_bytes = max(stage.peak_bytes, torch.cuda.max_memory_allocated(self._device))


def _resident_bytes() -> int:
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # not Linux: the peak so far, in bytes on macOS
