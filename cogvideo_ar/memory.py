"""Where nets wait for their turn, and what to try when a stage does not fit into memory."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from cogvideo_ar.config import CogVideoConfig
from cogvideo_ar.costs import stage_costs
from cogvideo_ar.options import Plan
from cogvideo_ar.parts import Parts
from shared.costs import most_memory
from shared.errors import OutOfMemoryError
from shared.memory import free_bytes, in_words
from shared.offload import OFFLOADS, OffloadMode, check_offload
from shared.quantize import QuantizeMode, quantize

ON_CPU = "the CPU computes where weights wait"


def resolve_offload(
    offload: str, config: CogVideoConfig, plan: Plan, dtype: torch.dtype, device: torch.device
) -> tuple[OffloadMode, str]:
    """What `offload` ("none", "model", "sequential" or "auto") comes to on `device`, and why: "auto" is the
    first of them with which `plan` fits. SettingError for other names, OutOfMemoryError if nothing fits."""
    check_offload(offload)
    if device.type == "cpu" and offload != "none":
        return "none", ON_CPU
    if offload != "auto":
        return cast("OffloadMode", offload), ""
    free = free_bytes(device)
    if free is None:
        return "none", "nobody knows how much memory is free"
    costs = stage_costs(config, plan, dtype)
    for mode in (modes := cast("list[OffloadMode]", [name for name in OFFLOADS if name != "auto"])):
        peak, stage = most_memory(costs, mode)
        if peak <= free:
            return mode, f"{stage.name} takes about {in_words(peak)} of {in_words(free)}"
    peak, stage = most_memory(costs, modes[-1])
    first, *others = advice(stage.name, offload=modes[-1], dtype=dtype, plan=plan)
    then = f"; then {', '.join(others)}" if others else ""
    raise OutOfMemoryError(
        f"{stage.name} needs about {in_words(peak)}, {in_words(free)} are free; try {first}{then}"
    )


def quantized(parts: Parts, mode: QuantizeMode) -> Parts:
    """The transformers' blocks in 8 bits, in place; the image codec is small. What both stages share they
    still do. Not exact: other tokens are drawn."""
    if mode == "none":
        return parts
    first, second = (
        {name: part for name, part in net.named_modules() if isinstance(part, nn.Linear)}
        for net in (parts.keyframes, parts.interpolation)
    )
    same = [name for name in first if name in second and second[name].weight is first[name].weight]
    for net in parts.nets[:-1]:
        quantize(net, mode)
    for name in same:
        second[name].weight = first[name].weight
    return parts


def advice(
    stage: str, *, offload: str = "none", dtype: torch.dtype, plan: Plan, on_cpu: bool = False
) -> list[str]:
    """The flags that are left to try when `stage` does not fit, the cheapest first: those that change no
    token, then the others."""
    modes = [] if on_cpu else [mode for mode in OFFLOADS[OFFLOADS.index(offload) + 1 :] if mode != "auto"]
    half = "bfloat16" if on_cpu else "float16"
    in_blocks = stage == "model/interpolation" and plan.sampling.max_batch > 1
    enlarges = plan.fine_draw is not None and stage in (
        "model/super_resolution",
        "model/refinement",
        "decode",
    )
    return [
        *(["--set max_batch=1"] if in_blocks else []),
        *(f"--offload {mode}" for mode in modes),
        *([f"--dtype {half}"] if dtype.itemsize > 2 else []),
        *(["--super_resolution direct"] if stage == "model/refinement" else []),
        *(["--super_resolution none"] if enlarges else []),
        "a smaller model" if stage == "loading" else "fewer frames",
    ]
