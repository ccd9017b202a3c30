"""The one sampling loop: from noise to latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cogvideox_diff.guidance import Predict
from cogvideox_diff.schedulers import Draw, Scheduler
from shared.errors import OutputCheckError

Guide = Callable[[Predict, Tensor, int, int], Tensor]  # (predict, x, timestep, step index) -> v in float32


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a callback sees after a step: `done` of `total` steps, the timestep just left, the sample and the
    estimate of the clean latents."""

    done: int
    total: int
    timestep: int
    x: Tensor
    x0: Tensor


@torch.no_grad()
def denoise(
    predict: Predict,
    scheduler: Scheduler,
    x_BTCHW: Tensor,
    guide: Guide,
    draw: Draw,
    *,
    start: int = 0,
    callback: Callable[[Step], None] | None = None,
    module: nn.Module | None = None,
    again: Predict | None = None,
) -> Tensor:
    """Run the steps `start`.. of `scheduler` on `x_BTCHW`, whose dtype the samples keep between steps.

    OutputCheckError at the first step with a NaN or Inf; it names the first such layer of `module`, if given,
    when `again` runs (default: `predict`; a CUDA graph of it would call no layer).
    """
    state = scheduler.init_state()
    steps = list(enumerate(scheduler.timesteps))[start:]
    for done, (i, timestep) in enumerate(steps, start=1):
        v = guide(predict, x_BTCHW, timestep, i - start)
        if not v.isfinite().all():
            probe = partial(again or predict, x_BTCHW, timestep)
            where = first_non_finite(module, probe) if module else ""
            raise OutputCheckError(f"NaN or Inf from the model at step {done} (timestep {timestep}){where}")
        x0 = scheduler.to_x0(x_BTCHW, v, i)
        x_BTCHW, state = scheduler.step(x_BTCHW, x0, i, state, draw)
        if not x_BTCHW.isfinite().all():
            raise OutputCheckError(f"NaN or Inf from the sampler at step {done} (timestep {timestep})")
        if callback is not None:
            callback(Step(done=done, total=len(steps), timestep=timestep, x=x_BTCHW, x0=x0))
    return x_BTCHW


def first_non_finite(module: nn.Module, run: Callable[[], object]) -> str:
    """Run once more and name the first layer of `module` whose output is not finite."""
    bad: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple, output: object) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if any(isinstance(x, Tensor) and not x.isfinite().all() for x in outputs):
                bad.append(name)

        return hook

    handles = [part.register_forward_hook(watch(name)) for name, part in module.named_modules() if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return f"; first bad layer: {bad[0]}" if bad else "; every layer is finite when run again"
