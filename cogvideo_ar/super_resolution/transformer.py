"""CogView2's super-resolution transformers: CogVideo's blocks, with attention that is local on the fine grid.

Direct: text | coarse cells | fine cells. The first two attend to one another as usual; a fine cell sees only
the coarse and fine cells near it, through projections of its own. Iterative: text | fine cells, one set of
projections; a fine cell sees the text and the fine cells near it.

Legend: B batch, T text, P prefix = everything before the fine cells, S fine cells, L sequence = P + S, C
channels, N heads, D head dim, H/W rows/columns of a grid, K entries of a window, V image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo_ar.attention import excluded, text_bias
from cogvideo_ar.config import SuperResolutionConfig
from cogvideo_ar.super_resolution.local_attention import Kernel, local_scores, local_values
from cogvideo_ar.transformer import Block, Channel
from shared.attention import attend

Grid = tuple[int, int]  # (rows, columns)


# ---- who sees whom


@dataclass(frozen=True, kw_only=True)
class DirectContext:
    """Attention of one pass of the direct model; the prefix never sees the fine cells."""

    coarse_grid: Grid
    fine_grid: Grid
    coarse_kernel: Kernel
    fine_kernel: Kernel
    prefix_bias: Tensor  # [B or 1, 1, P, P]
    coarse_weight: float = 0.0  # added to the scores of fine -> coarse cells
    dropout: float = 0.0

    def prefix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Text and coarse cells [B, N, P, D]."""
        return _attend(q, k, v, self.prefix_bias, self.dropout)

    def fine(self, q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
        """Fine cells [B, N, S, D]; the coarse ones are the last of the prefix."""
        num_coarse = self.coarse_grid[0] * self.coarse_grid[1]
        k_coarse, v_coarse = (_grid(x[:, :, -num_coarse:], self.coarse_grid) for x in (k_prefix, v_prefix))
        q_fine = _grid(q * q.shape[3] ** -0.5, self.fine_grid)
        k_fine, v_fine = _grid(k, self.fine_grid), _grid(v, self.fine_grid)
        coarse = local_scores(q_fine, k_coarse, self.coarse_kernel) + self.coarse_weight
        scores = torch.cat([coarse, local_scores(q_fine, k_fine, self.fine_kernel)], dim=3)
        weights = F.dropout(scores.softmax(3), self.dropout)
        to_coarse, to_fine = weights.split([coarse.shape[3], scores.shape[3] - coarse.shape[3]], dim=3)
        out = local_values(to_coarse, v_coarse, self.coarse_kernel)
        out = out + local_values(to_fine, v_fine, self.fine_kernel)
        return out.flatten(1, 2).view_as(q)


@dataclass(frozen=True, kw_only=True)
class IterativeContext:
    """Attention of one pass of the iterative model; the text never sees the fine cells."""

    fine_grid: Grid
    fine_kernel: Kernel
    padding: Tensor | None  # bias of text -> text [B or 1, 1, 1, T]
    text_bias: Tensor | None  # bias of fine cell -> text [B or 1, 1, 1, T]
    dropout: float = 0.0

    def prefix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Text [B, N, T, D]."""
        return _attend(q, k, v, self.padding, self.dropout)

    def fine(self, q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
        """Fine cells [B, N, S, D]."""
        q = q * q.shape[3] ** -0.5
        text_BNST = q @ k_prefix.mT
        if self.text_bias is not None:
            text_BNST = text_BNST + self.text_bias
        near = local_scores(_grid(q, self.fine_grid), _grid(k, self.fine_grid), self.fine_kernel)
        scores = torch.cat([text_BNST, near.flatten(1, 2).unflatten(0, q.shape[:2])], dim=3)
        weights = F.dropout(scores.softmax(3), self.dropout)
        to_text, to_near = weights.split([text_BNST.shape[3], near.shape[3]], dim=3)
        out = local_values(_grid(to_near, self.fine_grid), _grid(v, self.fine_grid), self.fine_kernel)
        return to_text @ v_prefix + out.flatten(1, 2).view_as(q)


def direct_context(
    config: SuperResolutionConfig,
    text_valid_BT: Tensor,
    like: Tensor,
    *,
    log_weights_PP: Tensor | None = None,
    coarse_weight: float = 0.0,
    dropout: float = 0.0,
) -> DirectContext:
    """Masks of the direct model in dtype and on device of `like`; `log_weights_PP` is added to the scores of
    the prefix."""
    seen_BPP = prefix_mask(text_valid_BT, config.coarse_len)
    weights = like.new_zeros(seen_BPP.shape[1:]) if log_weights_PP is None else log_weights_PP.to(like)
    bias_BPP = weights.expand(seen_BPP.shape).masked_fill(~seen_BPP, excluded(like.dtype))
    return DirectContext(
        coarse_grid=config.coarse_grid,
        fine_grid=config.fine_grid,
        coarse_kernel=config.coarse_kernel,
        fine_kernel=config.fine_kernel,
        prefix_bias=bias_BPP[:, None],
        coarse_weight=coarse_weight,
        dropout=dropout,
    )


def prefix_mask(text_valid_BT: Tensor, num_coarse: int) -> Tensor:
    """Who sees whom in the direct model's prefix, bool [B, P, P]: text sees text, coarse cells see text and
    coarse cells; only padding sees padding."""
    valid_BP = F.pad(text_valid_BT, (0, num_coarse), value=True)
    is_text_P = torch.arange(valid_BP.shape[1], device=valid_BP.device) < text_valid_BT.shape[1]
    seen_BPP = valid_BP[:, None] | ~valid_BP[:, :, None]
    return seen_BPP & ~(is_text_P[:, None] & ~is_text_P)


def iterative_context(
    config: SuperResolutionConfig,
    text_valid_BT: Tensor,
    like: Tensor,
    *,
    log_weights_T: Tensor | None = None,
    dropout: float = 0.0,
) -> IterativeContext:
    """Masks of the iterative model; `log_weights_T` is added to the scores of fine cell -> text alone."""
    padding = text_bias(text_valid_BT, text_valid_BT.shape[1], 0.0, like)
    assert padding is not None
    bias = padding
    if log_weights_T is not None:
        bias = torch.where(text_valid_BT[:, None, None], log_weights_T.to(like), padding)
    return IterativeContext(
        fine_grid=config.fine_grid,
        fine_kernel=config.fine_kernel,
        padding=padding,
        text_bias=bias,
        dropout=dropout,
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    if dropout:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return attend(q, k, v, bias=bias)


def _grid(x_BNSE: Tensor, grid: Grid) -> Tensor:
    """[B, N, S, E] -> [B * N, H, W, E]."""
    return x_BNSE.flatten(0, 1).unflatten(1, grid)


# ---- nets


class LocalAttention(nn.Module):
    """Prefix and fine cells, through the same projections or (`own_fine`) through two sets."""

    def __init__(self, config: SuperResolutionConfig, *, own_fine: bool) -> None:
        super().__init__()
        self.num_fine = config.fine_len
        self.base = Channel(config)
        if own_fine:
            self.fine = Channel(config)
        self.own_fine = own_fine

    def forward(self, x_BLC: Tensor, context: DirectContext | IterativeContext, cache: None = None) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        fine_channel = self.fine if self.own_fine else self.base
        prefix, fine = x_BLC.split([x_BLC.shape[1] - self.num_fine, self.num_fine], dim=1)
        q, k, v = self.base.heads(prefix)
        out = context.fine(*fine_channel.heads(fine), k, v)
        return torch.cat([self.base.merge(context.prefix(q, k, v)), fine_channel.merge(out)], dim=1)


class SuperResolutionTransformer(nn.Module):
    """Tokens of text, coarse and fine cells -> logits of the fine cells; embeddings and output head are
    tied."""

    def __init__(self, config: SuperResolutionConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.num_positions, config.hidden_size)
        self.extra_position_embeddings = nn.Embedding(config.fine_len, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        direct = config.kind == "direct"
        self.blocks = nn.ModuleList(
            Block(config, LocalAttention(config, own_fine=direct)) for _ in range(config.num_layers)
        )
        self.final_norm = nn.LayerNorm(config.hidden_size, config.layernorm_eps)
        self.reset_parameters()

    @property
    def device(self) -> torch.device:
        return self.word_embeddings.weight.device

    def hidden(
        self, tokens_BL: Tensor, positions_BP: Tensor, context: DirectContext | IterativeContext
    ) -> Tensor:
        """Normalised output of the last block at every place [B, L, C]; `positions_BP` are those of the
        prefix."""
        expected = positions_BP.shape[1] + self.config.fine_len
        if tokens_BL.shape[1] != expected:
            raise ValueError(f"expected {expected} tokens per row, got {tokens_BL.shape[1]}")
        fine_BSC = self.extra_position_embeddings.weight.expand(len(tokens_BL), -1, -1)
        positions_BLC = torch.cat([self.position_embeddings(positions_BP), fine_BSC], dim=1)
        x_BLC = self.dropout(self.word_embeddings(tokens_BL) + positions_BLC)
        for block in self.blocks:
            x_BLC = block(x_BLC, context)
        return self.final_norm(x_BLC)

    def image_logits(self, x: Tensor) -> Tensor:
        """Logits of the image tokens, float32 unless the model is float64. The direct model multiplies in
        float32, the iterative one in its own dtype, as they were trained."""
        weight = self.word_embeddings.weight[: self.config.num_image_tokens]
        if self.config.kind == "direct":
            wide = torch.promote_types(x.dtype, torch.float32)
            x, weight = x.to(wide), weight.to(wide)
        logits = F.linear(x, weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def reset_parameters(self) -> None:
        """N(0, 0.02), smaller for the outputs of the base projections and of the MLP; biases zero."""
        small = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=small if name.endswith(("base.out", "mlp.down")) else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
