"""Activation checkpointing: blocks keep little of what they computed, and compute it again for the gradient.

    none       keep everything
    block      keep each block's input (a third more computing, memory of one block instead of all)
    selective  also keep the results of matrix products and attention; norms, activations, rotations again

Random numbers are repeated too, so the gradients are those of a run that keeps everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from shared.offload import blocks_of

Recompute = Literal["none", "block", "selective"]
RECOMPUTE = ("none", "block", "selective")


@contextmanager
def recomputed(model: nn.Module, mode: Recompute) -> Iterator[None]:
    """Within the block, the model's blocks compute again in their backward pass what `mode` does not keep.

    They must be functions of their arguments: nothing that a call changes may be read by a later one.
    """
    blocks = blocks_of(model) if mode != "none" else []
    for block in blocks:  # the instance's forward, so that parameters keep their names
        block.forward = _recomputed(block.forward, mode)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _recomputed(forward: Callable[..., Any], mode: Recompute) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    again = partial(checkpoint, forward, use_reentrant=False)
    if mode == "selective":
        again = partial(again, context_fn=_keep_products)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (again if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return call


def _keep_products() -> Any:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    aten = torch.ops.aten
    kept = [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]
    return create_selective_checkpoint_contexts(kept)
