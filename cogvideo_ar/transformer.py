"""CogVideo's transformer: sandwich-norm blocks whose attention has a spatial and a temporal channel (paper
section 4; upstream `models/cogvideo_model.py` with SwissArmyTransformer's blocks).

Legend: B batch, T text, F frames, S slots of a frame, L sequence = T + F*S, C channels, N heads, D head
dim, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo_ar.attention import AttentionContext, FullAttention, region_slots
from cogvideo_ar.config import RELEASED_TEXT_ROOM, SANE, BlockConfig, Oddities, TransformerConfig
from cogvideo_ar.fast_decode import StepNet, applies
from cogvideo_ar.graph_step import GraphStep
from cogvideo_ar.kv_cache import ColumnCache, KVCache, LayerCache
from cogvideo_ar.layout import SequenceLayout, text_positions
from cogvideo_ar.slot_attention import Place, SlotAttention
from shared.cpu_attention import bags_take
from shared.cpu_linear import apply_linear
from shared.graphs import Capture


class Channel(nn.Module):
    """Projections of one attention channel."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def heads(self, x_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, each [B, N, L, D]."""
        qkv = apply_linear(self.qkv, x_BLC).unflatten(2, (3, -1, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def merge(self, x_BNLD: Tensor) -> Tensor:
        return apply_linear(self.out, x_BNLD.transpose(1, 2).flatten(2))


class DualChannelAttention(nn.Module):
    """Mix of both channels per feature, sigmoid(mix) being the spatial channel's share; text is spatial
    only."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.spatial = Channel(config)
        if config.temporal != "none":
            self.temporal = Channel(config)
            self.mix = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x_BLC: Tensor, context: AttentionContext, cache: LayerCache | None) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        out_BLC = self.spatial.merge(context.spatial(*self.spatial.heads(x_BLC), cache))
        if context.base_only:
            return out_BLC
        heads = self.temporal.heads(x_BLC)
        if context.num_text == x_BLC.shape[1]:  # nothing but text: it only enters the cache
            context.temporal(*heads, cache, self.layer)
            return out_BLC
        temporal = self.temporal.merge(context.temporal(*heads, cache, self.layer))
        text, spatial = out_BLC.split([context.num_text, temporal.shape[1]], dim=1)
        mixed = torch.lerp(temporal, spatial, self.mix.sigmoid().to(spatial.dtype))
        return torch.cat([text, mixed], dim=1) if context.num_text else mixed

    def fill(self, x_BLC: Tensor, context: FullAttention, cache: LayerCache) -> None:
        """Keys and values enter the caches; no row looks at another."""
        _, k, v = self.spatial.heads(x_BLC[:, : context.num_text])
        context.fill_spatial(k, v, cache)
        if not context.base_only:
            _, k, v = self.temporal.heads(x_BLC)
            context.fill_temporal(k, v, cache, self.layer)

    def init_temporal_from_spatial(self, *, copy_out: bool) -> None:
        self.temporal.qkv.load_state_dict(self.spatial.qkv.state_dict())
        if copy_out:
            self.temporal.out.load_state_dict(self.spatial.out.state_dict())
        self.mix.zero_()


class MLP(nn.Module):
    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(apply_linear(self.down, apply_linear(self.up, x, gelu=True)))


class Block(nn.Module):
    """Pre- and post-normalised ("sandwich") attention and MLP; what the context is, `attention` knows."""

    def __init__(self, config: BlockConfig, attention: nn.Module) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layernorm_eps
        self.attention_norm = nn.LayerNorm(size, eps)
        self.attention = attention
        self.attention_out_norm = nn.LayerNorm(size, eps)
        self.mlp_norm = nn.LayerNorm(size, eps)
        self.mlp = MLP(config)
        self.mlp_out_norm = nn.LayerNorm(size, eps)

    def forward(
        self, x: Tensor, context: Any, cache: LayerCache | None = None, *, fill_only: bool = False
    ) -> Tensor:
        """`fill_only`: nobody reads the result (the last block of a prefill), so only the caches are made."""
        if fill_only:
            self.attention.fill(self.attention_norm(x), context, cache)  # type: ignore[operator]
            return x
        x = x + self.attention_out_norm(self.attention(self.attention_norm(x), context, cache))
        return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))


@dataclass
class DecodeState:
    """One running generation: caches, and where it stands."""

    layout: SequenceLayout
    caches: list[LayerCache]
    context: SlotAttention
    positions: Tensor  # position embeddings of all slots [F*S, C]
    next_slot: int = 0  # counted over all frames
    quick: StepNet | None = None  # None: the plain blocks
    graph: GraphStep | None = None  # before the others


def layer_cache(
    config: TransformerConfig, layout: SequenceLayout, layer: int, like: Tensor, *, columns: bool = False
) -> LayerCache:
    """Room for the keys and values of one layer; `like` [B, ...] gives rows, dtype and device. `columns`: for
    steps on the CPU, but where keys are picked by place (3D local attention)."""
    spatial = ColumnCache if columns else KVCache
    temporal = KVCache if any(config.extent) else spatial
    shape = (like.shape[0], config.num_heads, config.head_dim)
    return LayerCache(
        spatial=spatial(*shape, [layout.text_len + layout.frame_len], like),
        temporal=temporal(*shape, region_sizes(config, layout, layer), like),
    )


def region_sizes(config: TransformerConfig, layout: SequenceLayout, layer: int) -> list[int]:
    """Positions of every region of a layer's temporal cache; none where the channel is left out."""
    regions = [] if layout.base_only else region_slots(layout, config.window, layer)
    return [layout.text_len + layout.num_frames * len(slots) for slots in regions]


class CogVideoTransformer(nn.Module):
    """Text and frame tokens -> logits of the next image tokens; embeddings and output head are tied.

    `recorder` makes what records the steps of a generation as graphs (`shared.graphs`); None: they run."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.num_positions, config.hidden_size)
        if config.temporal != "none":
            self.extra_position_embeddings = nn.Embedding(config.num_extra_positions, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.blocks = nn.ModuleList(
            Block(config, DualChannelAttention(config, layer)) for layer in range(config.num_layers)
        )
        self.final_norm = nn.LayerNorm(config.hidden_size, config.layernorm_eps)
        self.recorder: Callable[[], Capture] | None = None
        self.reset_parameters()

    # ---- whole sequences

    def forward(
        self,
        tokens_BL: Tensor,
        layout: SequenceLayout,
        *,
        text_valid_BT: Tensor | None = None,
        text_weight: float = 0.0,
    ) -> Tensor:
        """Logits of the image tokens at every slot [B, F*S, num_image_tokens].

        `text_valid_BT` marks padding (False); `text_weight` is added to the attention scores of slots ->
        text.
        """
        x_BLC = self.hidden(tokens_BL, layout, text_valid_BT=text_valid_BT, text_weight=text_weight)
        return self.image_logits(x_BLC[:, layout.frames])

    def hidden(
        self,
        tokens_BL: Tensor,
        layout: SequenceLayout,
        *,
        text_valid_BT: Tensor | None = None,
        text_weight: float = 0.0,
    ) -> Tensor:
        """Normalised output of the last block at every position [B, L, C]."""
        x_BLC = self.embed(tokens_BL, layout, text_valid_BT)
        context = FullAttention(
            layout,
            window=self.config.window,
            extent=self.config.extent,
            like=x_BLC,
            text_valid_BT=text_valid_BT,
            text_weight=text_weight,
            pb_relax=self.config.pb_relax and self.training,
            dropout=self.config.attention_dropout if self.training else 0.0,
        )
        for block in self.blocks:
            x_BLC = block(x_BLC, context)
        return self.final_norm(x_BLC)

    def embed(
        self,
        tokens_BL: Tensor,
        layout: SequenceLayout,
        text_valid_BT: Tensor | None,
        *,
        blanks: bool = False,
    ) -> Tensor:
        """Word plus position embeddings [B, L, C]; `blanks` lets ids below 0 stand for no word."""
        if tokens_BL.shape[1] != layout.length:
            raise ValueError(f"expected {layout.length} tokens per row, got {tokens_BL.shape[1]}")
        device = tokens_BL.device
        if text_valid_BT is None:
            text_ids = torch.arange(layout.text_len, device=device)[None]
        else:
            text_ids = text_positions(text_valid_BT)
        text = self.position_embeddings(text_ids).expand(tokens_BL.shape[0], -1, -1)
        slots = self.position_rows(layout.slot_positions().to(device))
        positions_BLC = torch.cat([text, slots.expand(tokens_BL.shape[0], -1, -1)], dim=1)
        words_BLC = self.word_embeddings(tokens_BL.clamp(min=0) if blanks else tokens_BL)
        if blanks:
            words_BLC = words_BLC.masked_fill((tokens_BL < 0)[..., None], 0.0)
        return self.dropout(words_BLC + positions_BLC)

    def position_rows(self, ids: Tensor) -> Tensor:
        """Rows of the base table, or, from the second frame on, of the extra one."""
        limit = self.config.image_position_offset + self.config.frame_len
        base = self.position_embeddings(ids.clamp(max=limit - 1))
        if not ids.numel() or int(ids.max()) < limit:
            return base
        extra = self.extra_position_embeddings((ids - limit).clamp(min=0))
        return torch.where((ids < limit)[:, None], base, extra)

    def logits(self, x: Tensor) -> Tensor:
        """Logits of all rows of the embedding table."""
        return F.linear(x, self.word_embeddings.weight)

    def image_logits(self, x: Tensor) -> Tensor:
        """Logits of the image tokens."""
        return F.linear(x, self.word_embeddings.weight[: self.config.num_image_tokens])

    # ---- one slot at a time

    @torch.inference_mode()
    def start(
        self,
        text_BT: Tensor,
        given_BL: Tensor,
        layout: SequenceLayout,
        *,
        text_valid_BT: Tensor | None = None,
        text_weight: float = 0.0,
        oddities: Oddities = SANE,
    ) -> DecodeState:
        """Prefill: text and the slots of the given frames [B, G*S] enter the caches."""
        num_given = given_BL.shape[1] // layout.frame_len
        like = self.word_embeddings.weight.new_empty(len(text_BT), 0)
        steps = SlotAttention(
            layout,
            window=self.config.window,
            extent=self.config.extent,
            like=like,
            text_valid_BT=text_valid_BT,
            text_weight=text_weight,
            text_room=RELEASED_TEXT_ROOM if oddities.short_text_cache else None,
        )
        graph = self.recorder and GraphStep(self, self.recorder(), num_given=num_given)
        quick = not graph and applies(self)
        state = DecodeState(
            layout=layout,
            caches=[
                layer_cache(self.config, layout, layer, like, columns=quick and bags_take(like.dtype))
                for layer in range(self.config.num_layers)
            ],
            context=steps,
            positions=self.position_rows(layout.slot_positions().to(like.device)),
            next_slot=num_given * layout.frame_len,
            quick=StepNet(self, base_only=layout.base_only, rows=len(text_BT)) if quick else None,
            graph=graph,
        )
        tokens_BL, prefix = torch.cat([text_BT, given_BL], dim=1), layout.prefix(num_given)
        for first in range(0, len(tokens_BL), prefix.rows_at_once):
            rows = slice(first, first + prefix.rows_at_once)
            valid = None if text_valid_BT is None else text_valid_BT[rows]
            caches = [cache.of_rows(rows) for cache in state.caches]
            self._fill(tokens_BL[rows], prefix, caches, valid, text_weight, oddities)
        return state

    def _fill(
        self,
        tokens_BL: Tensor,
        prefix: SequenceLayout,
        caches: list[LayerCache],
        text_valid_BT: Tensor | None,
        text_weight: float,
        oddities: Oddities,
    ) -> None:
        x_BLC = self.embed(tokens_BL, prefix, text_valid_BT, blanks=oddities.interpolation_guider_offset)
        # Quirk(temporal_text_bias_decode_only), Quirk(cyclic_prefill_windows)
        context = FullAttention(
            prefix,
            window=self.config.window,
            extent=self.config.extent,
            like=x_BLC,
            text_valid_BT=text_valid_BT,
            text_weight=text_weight,
            text_weight_temporal=0.0 if oddities.temporal_text_bias_decode_only else None,
            cyclic=oddities.cyclic_prefill_windows,
        )
        for block, cache in zip(self.blocks, caches, strict=True):
            x_BLC = block(x_BLC, context, cache, fill_only=cache is caches[-1])

    def step(self, tokens_B: Tensor, state: DecodeState) -> Tensor:
        """Feed the next slot's token (start-of-image first in every frame); logits of its image token [B,
        V], float32 unless the model is float64."""
        place = divmod(state.next_slot, state.layout.frame_len)
        state.next_slot += 1
        return self.feed(tokens_B[:, None], (place,), state)[:, 0]

    @torch.inference_mode()
    def feed(self, tokens_BP: Tensor, wave: tuple[Place, ...], state: DecodeState) -> Tensor:
        """Feed one slot's token of each of several frames; logits [B, P, V], as `step`'s."""
        state.context.aim(wave)
        logits_BPV = self._logits(tokens_BP, wave, state)
        return logits_BPV if logits_BPV.dtype == torch.float64 else logits_BPV.float()

    def _logits(self, tokens_BP: Tensor, wave: tuple[Place, ...], state: DecodeState) -> Tensor:
        if state.graph is not None:
            return state.graph(tokens_BP, wave, state)
        rows = [frame * state.layout.frame_len + slot for frame, slot in wave]
        # views, as numbers on the way to a device are waited for
        x_BPC = self.word_embeddings(tokens_BP) + torch.cat([state.positions[row : row + 1] for row in rows])
        if state.quick is not None:
            return state.quick.logits(x_BPC, state.context, state.caches)
        for block, cache in zip(self.blocks, state.caches, strict=True):
            x_BPC = block(x_BPC, state.context, cache)
        return self.image_logits(self.final_norm(x_BPC))

    # ---- parameters

    def reset_parameters(self) -> None:
        """Initialisation of the released training: N(0, 0.02), smaller for the spatial channel's and the
        MLP's outputs; biases and the mix are zero."""
        small = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = small if name.endswith(("spatial.out", "mlp.down")) else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @torch.no_grad()
    def init_temporal_from_base(self, *, copy_out: bool = False) -> None:
        """Start the temporal channel as a copy of the spatial one, positions of later frames as the first
        frame's.

        The paper copies everything; the released code leaves the output projection random (`copy_out=False`).
        """
        for module in self.modules():
            if isinstance(module, DualChannelAttention):
                module.init_temporal_from_spatial(copy_out=copy_out)
        offset, size = self.config.image_position_offset, self.config.frame_len
        rows = torch.arange(self.config.num_extra_positions, device=self.position_embeddings.weight.device)
        frame = self.position_embeddings.weight[offset : offset + size]
        self.extra_position_embeddings.weight.copy_(frame[rows % size])

    def temporal_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters of the temporal channel: all that the released training changes."""
        return ((n, p) for n, p in self.named_parameters() if _is_temporal(n))

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters inherited from the text-to-image model."""
        return ((n, p) for n, p in self.named_parameters() if not _is_temporal(n))


def _is_temporal(name: str) -> bool:
    return (
        name.startswith("extra_position") or ".attention.temporal." in name or name.endswith("attention.mix")
    )
