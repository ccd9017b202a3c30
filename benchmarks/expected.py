"""What the cost model expects of a run's stages, beside what was measured: plain values for results.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shared.costs import CPU_GBYTES, CPU_GFLOPS, DEVICES, GIB, Device, StageCost, cpu_device

NAMED = ("h200", "rtx4090")
CPU = "CPU core"


def cost_model(stages: Sequence[StageCost], dtype: torch.dtype) -> dict[str, Any]:
    """Stage -> operations, bytes, sequential steps, and the least seconds on some devices (a roofline:
    starting kernels and Python are not in it)."""
    return {stage.name: stage_values(stage, dtype) for stage in stages}


def stage_values(stage: StageCost, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "steps": stage.steps,
        "unit": stage.unit,
        "flops": stage.flops,
        "bytes_moved": stage.moved,
        "weight_bytes": stage.weights,
        "cache_bytes": stage.cache,
        "work_bytes": stage.work,
        "least_seconds": {name: device.stage_seconds(stage, dtype) for name, device in devices().items()},
    }


def devices() -> dict[str, Device]:
    """One core of a CPU as it was measured once, and GPUs by their data sheets."""
    return {CPU: cpu_device(CPU_GFLOPS, CPU_GBYTES, 8 * GIB), **{name: DEVICES[name] for name in NAMED}}
