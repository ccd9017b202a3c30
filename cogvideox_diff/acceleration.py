"""Quicker ways to run the transformer that a user chooses: compiled blocks, a step as one CUDA graph, another
attention kernel. The function is the same; rounding differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cogvideox_diff.transformer import ExpertTransformer
from shared.attention import BACKENDS, Backend, attend
from shared.errors import SettingError
from shared.graphs import Capture, Replay, SharedPool

Compile = Literal["none", "blocks", "graph"]
COMPILES: tuple[str, ...] = get_args(Compile)
ON_CPU = ("sdpa", "math", "flash")


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """`compile`: "blocks" by torch.compile, whose first step takes a minute or more; "graph" as one CUDA
    graph, which leaves out what the CPU does between kernels. `attention`: a kernel of `shared.attention`."""

    compile: Compile = "none"
    attention: Backend = "sdpa"

    def check(self, device: torch.device, *, offload: str = "none", processes: int = 1) -> None:
        """SettingError where it does not go with the device or with how the transformer is run."""
        if self.compile not in COMPILES:
            raise SettingError(f"unknown compile {self.compile!r}; legal: {', '.join(COMPILES)}")
        if self.attention not in BACKENDS:
            raise SettingError(f"unknown attention {self.attention!r}; legal: {', '.join(BACKENDS)}")
        if device.type == "cpu" and self.attention not in ON_CPU:
            raise SettingError(f"attention {self.attention} needs a GPU; legal here: {', '.join(ON_CPU)}")
        if self.attention == "xformers" and find_spec("xformers") is None:
            raise SettingError("attention xformers needs the package xformers; nearest: sdpa")
        if self.compile == "graph" and device.type != "cuda":
            raise SettingError(
                f"compile graph needs a CUDA device, got {device.type}; legal here: none, blocks"
            )
        if self.compile != "none" and (offload != "none" or processes > 1):
            raise SettingError(
                f"compile {self.compile} needs weights that stay and one process; "
                f"got offload {offload}, {processes} process(es)"
            )

    def settings(self) -> dict[str, str]:
        """What is not by default, as JSON values."""
        chosen = {"compile": self.compile, "attention": self.attention}
        return {name: value for name, value in chosen.items() if value != getattr(DEFAULT, name)}

    def apply(self, model: ExpertTransformer) -> Callable[..., Tensor]:
        """Let `model` run so, in place; returns what to call for a step. It comes last, after `share` (see
        `parallel_pipeline`) and adapters."""
        if self.attention != "sdpa":
            model.attend_by(partial(attend, backend=self.attention))
        if self.compile == "blocks":
            for block in model.blocks:
                block.compile(dynamic=False)
        return Graphed(model) if self.compile == "graph" else model


DEFAULT = Acceleration()


# ---- CUDA graphs


class Graphed:
    """`model` without gradients, recorded once for each set of shapes and types of its inputs and replayed.

    The model's weights must stay where they are. `capture` records; a test gives its own. Results are copied
    at once, so all graphs may work in one pool of memory."""

    def __init__(self, model: Callable[..., Tensor], capture: Capture | None = None) -> None:
        self.model, self.capture = model, capture or SharedPool()
        self.recorded: dict[Any, tuple[list[Tensor | None], Tensor, Replay]] = {}

    @torch.no_grad()
    def __call__(self, *inputs: Tensor | None) -> Tensor:
        rows = [None if x is None else different_rows(x) for x in inputs]
        key = tuple(
            None if x is None or row is None else (x.shape, row.shape, x.dtype, x.device)
            for x, row in zip(inputs, rows, strict=True)
        )
        if key not in self.recorded:
            own = [None if row is None else row.clone() for row in rows]
            given = [
                None if x is None or row is None else row.expand_as(x)
                for x, row in zip(inputs, own, strict=True)
            ]
            self.recorded[key] = own, *self.capture(lambda: self.model(*given))
        own, result, replay = self.recorded[key]
        for kept, row in zip(own, rows, strict=True):
            if kept is not None and row is not None:
                kept.copy_(row)
        replay()
        return result.clone()


def different_rows(x: Tensor) -> Tensor:
    """Of a tensor whose rows are one and the same, expanded (the timestep), that one: what is computed of it
    once must be so in a graph too."""
    return x[:1] if x.stride(0) == 0 else x
