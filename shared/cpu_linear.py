"""Matrix products on the CPU in float32 by oneDNN, which torch has in it but gives only half precision to.

torch's own choice, MKL, runs at half speed on AMD's processors: 104 against 211 GFLOP/s on one thread of a
Zen 5. Elsewhere both are alike. In bfloat16 only the GELU behind a product gains: 18 against 36 ms where it
is no pass of its own (3699 rows, 512 to 2048 channels).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def has_quick_linear(x: Tensor) -> bool:
    """Whether oneDNN may take products of `x`: float32 on the CPU, no gradients, no autocast, and not within
    torch.compile, which does not know them by this name."""
    return x.dtype == torch.float32 and _may_name_onednn(x)


def has_quick_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this CPU; elsewhere torch does, slowly."""
    mkldnn = torch.backends.mkldnn
    return mkldnn.is_available() and mkldnn.enabled and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _may_name_onednn(x: Tensor) -> bool:
    return (
        takes_own_paths(x) and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
    )


def takes_own_paths(x: Tensor) -> bool:
    """Whether operators that have no gradient, and that torch.compile does not know, may be called on `x`: on
    the CPU."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def quick_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """`F.linear`, by oneDNN where it may; rounding differs. `gelu`: and then GELU (tanh)."""
    quick = has_quick_linear(x)
    if (
        gelu and x.dtype == torch.bfloat16
    ):  # its products are oneDNN's anyway, but the GELU is a pass of its own
        quick = _may_name_onednn(x) and has_quick_bfloat16()
    if quick and type(weight) in (Tensor, nn.Parameter) and weight.dtype == x.dtype and x.numel():
        after, kind = ("gelu", "tanh") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, after, [], kind)
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def apply_linear(linear: nn.Module, x: Tensor, *, gelu: bool = False) -> Tensor:
    """`linear(x)`; a plain `nn.Linear` (no adapter, not quantized, nobody listening) by `quick_linear`."""
    if type(linear) is nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks):
        return quick_linear(x, linear.weight, linear.bias, gelu=gelu)
    y = linear(x)
    return F.gelu(y, approximate="tanh") if gelu else y
