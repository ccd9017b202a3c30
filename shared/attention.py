"""The one attention kernel that both families call; masks and patterns stay at home in the families.

Legend: B batch, N heads, L queries, S keys, D head dim.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Backend = Literal["sdpa", "math", "xformers", "flash", "efficient", "cudnn"]
BACKENDS: tuple[str, ...] = get_args(Backend)
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def attend(
    q_BNLD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, *, bias: Tensor | None = None, backend: Backend = "sdpa"
) -> Tensor:
    """Softmax attention [B, N, L, D] with scale 1/sqrt(D); `bias` (broadcasts to [B, N, L, S]) is added to
    the scores, -inf excludes a key. "math" is the reference for the others; "sdpa" lets torch choose of
    its own kernels, which "flash", "efficient" and "cudnn" name (RuntimeError where one does not run: most
    need CUDA, "flash" takes no bias); "xformers" needs CUDA."""
    match backend:
        case "sdpa":
            return F.scaled_dot_product_attention(q_BNLD, k_BNSD, v_BNSD, attn_mask=bias)
        case "math":
            scores_BNLS = q_BNLD @ k_BNSD.mT * q_BNLD.shape[-1] ** -0.5
            return (scores_BNLS if bias is None else scores_BNLS + bias).softmax(-1) @ v_BNSD
        case "flash" | "efficient" | "cudnn":
            with sdpa_kernel(KERNELS[backend]):
                return F.scaled_dot_product_attention(q_BNLD, k_BNSD, v_BNSD, attn_mask=bias)
        case "xformers":
            return _attend_xformers(q_BNLD, k_BNSD, v_BNSD, bias)
        case _:
            raise ValueError(f"unknown attention backend {backend!r}; legal: {', '.join(BACKENDS)}")


def _attend_xformers(q_BNLD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, bias: Tensor | None) -> Tensor:
    # CUDA only, and an optional extra
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    if bias is not None:
        bias = bias.to(q_BNLD.dtype).expand(*q_BNLD.shape[:3], k_BNSD.shape[2])
    q_BLND, k_BSND, v_BSND = (x.transpose(1, 2) for x in (q_BNLD, k_BNSD, v_BNSD))
    return memory_efficient_attention(q_BLND, k_BSND, v_BSND, attn_bias=bias).transpose(1, 2)
