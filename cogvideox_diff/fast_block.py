"""A block of the expert transformer without gradients: the same function with fewer passes over memory.

One sample at a time, so that what is computed stays small; all tokens of a sample's part share a modulation,
which then is LayerNorm's own weight and bias. Rotation and the second residual work in place.

Legend: as in `transformer.py`; a sample has no B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.attention import attend
from shared.cpu_attention import attend_in_blocks
from shared.cpu_linear import apply_linear

if TYPE_CHECKING:
    from cogvideox_diff.transformer import Attention, ExpertAdaLayerNorm, ExpertBlock, Rope

FEWEST_VALUES = 2**17  # tokens * width: below it the number of operators counts, not what they do
FEWEST_TOKENS = 1024  # for attention in blocks

Modulation = tuple[Tensor, Tensor, Tensor]  # shift, scale, gate [D]
Modulations = tuple[Modulation, Modulation]  # of the text and of the video


def applies(video_BVD: Tensor) -> bool:
    """Whether the plain layers may be left: without gradients and autocast, and where it pays; float64 takes
    no path of its own."""
    if torch.is_grad_enabled() or video_BVD.dtype == torch.float64:
        return False
    kind = video_BVD.device.type
    return video_BVD[0].numel() >= FEWEST_VALUES and (kind == "meta" or not torch.is_autocast_enabled(kind))


def run_block(
    block: ExpertBlock, text_BLD: Tensor, video_BVD: Tensor, emb_BE: Tensor, rope: Rope | None
) -> tuple[Tensor, Tensor]:
    """What `block` does; the inputs stay as they are."""
    text, video = torch.empty_like(text_BLD), torch.empty_like(video_BVD)
    for b, (first, second) in enumerate(all_modulations(block, emb_BE)):
        text_mod, video_mod = first
        joint = normalised(block.norm1.norm, (text_BLD[b], text_mod), (video_BVD[b], video_mod))
        parts = attention(block.attn, joint, rope, len(text_BLD[b])).tensor_split([len(text_BLD[b])])
        torch.addcmul(text_BLD[b], text_mod[2], parts[0], out=text[b])
        torch.addcmul(video_BVD[b], video_mod[2], parts[1], out=video[b])

        text_mod, video_mod = second
        joint = normalised(block.norm2.norm, (text[b], text_mod), (video[b], video_mod))
        hidden = apply_linear(block.mlp.fc1, joint, gelu=True)
        parts = apply_linear(block.mlp.fc2, hidden).tensor_split([len(text_BLD[b])])
        text[b].addcmul_(text_mod[2], parts[0])
        video[b].addcmul_(video_mod[2], parts[1])
    return text, video


def all_modulations(block: ExpertBlock, emb_BE: Tensor) -> list[tuple[Modulations, Modulations]]:
    """Of both norms, for every sample; computed once where all have one embedding, expanded."""
    distinct = emb_BE[:1] if emb_BE.stride(0) == 0 else emb_BE
    found = [(modulations(block.norm1, e), modulations(block.norm2, e)) for e in F.silu(distinct)]
    return found if len(found) == len(emb_BE) else found * len(emb_BE)


def modulations(norm: ExpertAdaLayerNorm, emb_E: Tensor) -> Modulations:
    """Of the text and of the video."""
    text, video = (layer(emb_E).chunk(3) for layer in (norm.text, norm.video))
    return (text[0], text[1], text[2]), (video[0], video[1], video[2])


def normalised(norm: nn.LayerNorm, *parts: tuple[Tensor, Modulation]) -> Tensor:
    """Both parts [S, D], each after LayerNorm with its shift and scale in the weight and bias."""
    return torch.cat(
        [
            F.layer_norm(
                x, x.shape[-1:], norm.weight * (1 + scale), norm.bias * (1 + scale) + shift, norm.eps
            )
            for x, (shift, scale, _) in parts
        ]
    )


def attention(layer: Attention, x_SD: Tensor, rope: Rope | None, text_len: int) -> Tensor:
    q_SND, k_SND, v_SND = (
        apply_linear(linear, x_SD).unflatten(-1, (-1, layer.head_dim))
        for linear in (layer.q, layer.k, layer.v)
    )
    q_SND, k_SND = layer.norm_q(q_SND), layer.norm_k(k_SND)
    if rope is not None:
        for x_SND in (q_SND, k_SND):
            rotate_(x_SND[text_len:], (rope[0][text_len:], rope[1][text_len:]))
    q, k, v = (x.transpose(0, 1)[None] for x in (q_SND, k_SND, v_SND))
    out_BNSD = (quick_attend if layer.attend is attend else layer.attend)(q, k, v)
    return apply_linear(layer.out, out_BNSD[0].transpose(0, 1).flatten(1))


def rotate_(x_VND: Tensor, rope: Rope) -> None:
    """Turn every neighbouring pair of values by its angle, in place: a product of complex numbers."""
    turn_V1D = torch.complex(*rope)[:, None]
    pairs = x_VND.float().unflatten(-1, (-1, 2))  # of float32 no copy
    turned = torch.view_as_real(torch.view_as_complex(pairs).mul_(turn_V1D))
    if x_VND.dtype != torch.float32:
        x_VND.copy_(turned.flatten(-2))


def quick_attend(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    """`attend`, for one sample of many tokens on the CPU without gradients in blocks of rows."""
    rows, long = len(q_BNSD), q_BNSD.shape[2] >= FEWEST_TOKENS
    if rows > 1 or not long or q_BNSD.device.type != "cpu" or not applies(q_BNSD):
        return attend(q_BNSD, k_BNSD, v_BNSD)
    return attend_in_blocks(q_BNSD, k_BNSD, v_BNSD)
