"""Steps of few rows on the CPU, where reading the weights is what takes time: the same function as the plain
blocks, with other rounding.

oneDNN reads weights that it has laid out itself at two to three times the rate of torch's own product (for
two rows in float32 30 against 11 GB/s on a Zen 5, in bfloat16 20 against 13). Since they are copies anyway,
both channels' projections become one matrix and the mix of the channels goes into the output's. The copies
live as long as the generation; a net that is too large for a second copy goes without.

Legend: B rows, P slots of a wave, C channels, N heads, D head dim, V image tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cogvideo_ar.kv_cache import LayerCache
from shared.quantize import is_quantized

if TYPE_CHECKING:
    from cogvideo_ar.slot_attention import SlotAttention
    from cogvideo_ar.transformer import Block, Channel, CogVideoTransformer, DualChannelAttention

FEWEST_CHANNELS = 128  # below it the number of operators counts, not what they read
MOST_BYTES = 2**30  # of a net that is copied


def applies(model: CogVideoTransformer) -> bool:
    """Whether the plain blocks may be left, and whether it pays."""
    weight = model.word_embeddings.weight
    if weight.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if not pays(model.config.hidden_size, packed_bytes(model), weight.dtype):
        return False
    return not (model.training or is_quantized(model)) and _is_plain(model)


def pays(hidden_size: int, num_bytes: int, dtype: torch.dtype) -> bool:
    """Whether a net is copied of this width, whose copies take so many bytes."""
    return FEWEST_CHANNELS <= hidden_size and num_bytes <= MOST_BYTES and _has_packing(dtype)


def packed_bytes(model: CogVideoTransformer) -> int:
    """Of the copies that `StepNet` makes, whatever the stage."""
    head = model.config.num_image_tokens * model.config.hidden_size
    return sum(p.nbytes for p in model.blocks.parameters()) + head * model.word_embeddings.weight.itemsize


def _has_packing(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _is_plain(model: nn.Module) -> bool:
    """No adapter, nothing quantized, nobody listening."""
    known = (nn.Linear, nn.LayerNorm, nn.Embedding)
    return all(
        not (module._forward_hooks or module._forward_pre_hooks)
        and (type(module) in known or not list(module.parameters(recurse=False)) or _is_ours(module))
        for module in model.modules()
    )


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__ == "cogvideo_ar.transformer"


class PackedLinear:
    """`F.linear` with a copy of the weight, laid out for products of about so many rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self.bias = bias

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        after, kind = ("gelu", "tanh") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, after, [], kind)


class StepBlock:
    """One block of a step; `channels` 1 leaves the temporal channel out, as the context does."""

    def __init__(self, block: Block, channels: int, rows: int) -> None:
        attention: DualChannelAttention = block.attention  # type: ignore[assignment]
        both = [attention.spatial, attention.temporal][:channels] if channels > 1 else [attention.spatial]
        self.head_dim, self.layer = attention.spatial.head_dim, attention.layer
        self.norms = (block.attention_norm, block.attention_out_norm, block.mlp_norm, block.mlp_out_norm)
        projections = [channel.qkv for channel in both]
        self.qkv = PackedLinear(
            torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections]), rows
        )
        self.out = PackedLinear(*_mixed_out(both, attention), rows)
        self.up = PackedLinear(block.mlp.up.weight, block.mlp.up.bias, rows)
        self.down = PackedLinear(block.mlp.down.weight, block.mlp.down.bias, rows)

    def __call__(self, x_BPC: Tensor, context: SlotAttention, cache: LayerCache) -> Tensor:
        before, behind, before_mlp, behind_mlp = self.norms
        x_BPC = x_BPC + behind(self.out(self._attend(before(x_BPC), context, cache)))
        return x_BPC + behind_mlp(self.down(self.up(before_mlp(x_BPC), gelu=True)))

    def _attend(self, x_BPC: Tensor, context: SlotAttention, cache: LayerCache) -> Tensor:
        """Context vectors of the channels side by side [B, P, C or 2C]."""
        heads = self.qkv(x_BPC).unflatten(2, (-1, 3, x_BPC.shape[2] // self.head_dim, self.head_dim))
        first, *others = heads.permute(2, 3, 0, 4, 1, 5).unbind(0)  # each [q k v, B, N, P, D]
        outs = [context.spatial(first[0], first[1], first[2], cache)]
        outs += [context.temporal(x[0], x[1], x[2], cache, self.layer) for x in others]
        return torch.cat([out.transpose(1, 2).flatten(2) for out in outs], dim=2)


def _mixed_out(channels: list[Channel], attention: DualChannelAttention) -> tuple[Tensor, Tensor]:
    """Output weight [C, C or 2C] and bias of the channels side by side, the spatial one's share in them."""
    if len(channels) == 1:
        return channels[0].out.weight, channels[0].out.bias
    share = attention.mix.float().sigmoid()
    shares, dtype = (share, 1 - share), attention.mix.dtype
    weights = [s[:, None] * c.out.weight for s, c in zip(shares, channels, strict=True)]
    biases = [s * c.out.bias for s, c in zip(shares, channels, strict=True)]
    return torch.cat(weights, dim=1).to(dtype), sum(biases, torch.zeros(())).to(dtype)


class StepNet:
    """Everything of a model behind the embeddings, for steps of about so many rows."""

    def __init__(self, model: CogVideoTransformer, *, base_only: bool, rows: int) -> None:
        channels = 1 if base_only else 2
        self.blocks = [StepBlock(block, channels, rows) for block in model.blocks]  # type: ignore[arg-type]
        self.final_norm = model.final_norm
        self.head = PackedLinear(model.word_embeddings.weight[: model.config.num_image_tokens], None, rows)

    def logits(self, x_BPC: Tensor, context: SlotAttention, caches: list[LayerCache]) -> Tensor:
        """[B, P, C] -> [B, P, V]."""
        for block, cache in zip(self.blocks, caches, strict=True):
            x_BPC = block(x_BPC, context, cache)
        return self.head(self.final_norm(x_BPC))
