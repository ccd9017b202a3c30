"""How the 2022 release reads the text and the given frames, in our words and over our weights.

What makes it slow: scores of all pairs of rows, joined with those of the text and taken apart again, masked
by arithmetic over whole score tensors; keys and values carried back from windows to raster order; the head
over all positions, whose logits nobody reads. In stage 2 two samples at a time. The windows of the given
frames reach across the frame's borders, as they do there.

Legend: B rows, T text, G given frames, S slots of a frame, L = T + G*S, C channels, N heads, W windows, K
slots of a window, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import registry

ROWS_OF_STAGE_2 = 2
EXCLUDED = 10000.0


@dataclass
class Memory:
    """Keys | values of one channel and layer, and how many positions are filled."""

    kv: Tensor  # [B, room, 2C]
    length: int

    def filled(self) -> Tensor:
        return self.kv[:, : self.length]

    def append(self, new_B1C: Tensor) -> None:
        self.kv[:, self.length : self.length + 1] = new_B1C
        self.length += 1


Memories = list[tuple[Memory, Memory]]  # spatial and temporal, by layer


def mlp(block: Any, x: Tensor) -> Tensor:
    """The block's MLP by torch's own products, as the release calls them."""
    return block.mlp.down(F.gelu(block.mlp.up(x), approximate="tanh"))


def image_logits(model: Any, x_BLC: Tensor) -> Tensor:
    """Logits of the image tokens, from weights cast anew."""
    head_VC = model.word_embeddings.weight[: model.config.num_image_tokens]
    return F.linear(model.final_norm(x_BLC).float(), head_VC.float())


def prefill(model: Any, layout: Any, text_BT: Tensor, given_BGS: Tensor) -> Memories:
    """The memories behind the text and the given frames; of the spatial channel's only the text's stay."""
    slots = registry.module("cogvideo", "layout").frame_slots(given_BGS, model.config.start_of_image)
    tokens_BL, like = torch.cat([text_BT, slots], dim=1), model.word_embeddings.weight
    text, width = layout.text_len, 2 * model.config.hidden_size
    rooms = (text + layout.frame_len, layout.length)
    memories = [
        tuple(Memory(like.new_zeros(len(tokens_BL), room, width), 0) for room in rooms)
        for _ in range(model.config.num_layers)
    ]
    rows = ROWS_OF_STAGE_2 if layout.given_bidirectional else len(tokens_BL)
    logits = []
    for first in range(0, len(tokens_BL), rows):
        part = slice(first, first + rows)
        last, kept = _Forward(model, layout, given_BGS.shape[1])(tokens_BL[part])
        logits.append(last)
        for (spatial, temporal), (new_spatial, new_temporal) in zip(memories, kept, strict=True):
            spatial.kv[part, :text], spatial.length = new_spatial[:, :text], text
            temporal.kv[part, : new_temporal.shape[1]] = new_temporal
            temporal.length = new_temporal.shape[1]
    torch.cat(logits)
    return memories  # type: ignore[return-value]


class _Forward:
    """All positions at once: the logits, and keys | values [B, L, 2C] of both channels by layer."""

    def __init__(self, model: Any, layout: Any, num_given: int) -> None:
        self.model, self.layout, self.frames = model, layout, num_given
        self.text, self.causal = layout.text_len, not layout.given_bidirectional

    def __call__(self, tokens_BL: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        model, kept = self.model, []
        slots = self.layout.slot_positions()[: self.frames * self.layout.frame_len]
        text = model.position_embeddings(torch.arange(self.text))
        x_BLC = model.word_embeddings(tokens_BL) + torch.cat([text, model.position_rows(slots)])
        for layer, block in enumerate(model.blocks):
            attended, *keys_values = self._attention(layer, block.attention, block.attention_norm(x_BLC))
            x_BLC = x_BLC + block.attention_out_norm(attended)
            x_BLC = x_BLC + block.mlp_out_norm(mlp(block, block.mlp_norm(x_BLC)))
            kept.append(tuple(keys_values))
        return image_logits(model, x_BLC), kept

    def _attention(self, layer: int, attention: Any, x_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        text, size = self.text, x_BLC.shape[2]
        qkv = attention.spatial.qkv(x_BLC)
        text_out, frames_out = self._spatial(*(self._heads(x) for x in qkv.chunk(3, dim=-1)))
        kv_temporal = attention.temporal.qkv(x_BLC[:, :text])[..., size:]
        out = attention.spatial.out(text_out)
        if self.frames:
            over_time, kv_frames = self._temporal(layer, attention.temporal, x_BLC[:, text:], kv_temporal)
            share = attention.mix.sigmoid()
            mixed = attention.spatial.out(frames_out) * share + attention.temporal.out(over_time) * (
                1 - share
            )
            out = torch.cat([out, mixed], dim=1)
            kv_temporal = torch.cat([kv_temporal, kv_frames], dim=1)
        return out, qkv[..., size:], kv_temporal

    def _spatial(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Context of the text and of the frames."""
        text, frames = self.text, (self.frames, self.layout.frame_len)
        q = q / q.shape[-1] ** 0.5
        to_text = q @ k[:, :, :text].mT
        of_text = _masked(to_text[:, :, :text], torch.ones_like(to_text[:1, :1, :text]))
        text_out = _merged(of_text.softmax(-1) @ v[:, :, :text])
        q_f, k_f, v_f = (x[:, :, text:].unflatten(2, frames) for x in (q, k, v))
        own = q_f @ k_f.mT  # [B, N, G, S, S]
        if self.causal:
            own = _masked(own, torch.ones_like(own[:1, :1, :1]).tril())
        weights = torch.cat([to_text[:, :, text:], own.flatten(2, 3)], dim=-1).softmax(-1)
        of_frames = (weights[..., text:].unflatten(2, frames) @ v_f).flatten(2, 3)
        return text_out, _merged(weights[..., :text] @ v[:, :, :text] + of_frames)

    def _temporal(
        self, layer: int, channel: Any, x_BJC: Tensor, text_kv_BTC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Context of the frames, and their keys | values."""
        rows, window = len(x_BJC), self.model.config.window
        shift = window // 2 * (layer % 2)
        if window:
            x_BJC = self._to_windows(x_BJC, window, shift)
        q, k, v = (self._heads(x) for x in channel.qkv(x_BJC).chunk(3, dim=-1))  # [B * W, N, G * K, D]
        k_text, v_text = (self._heads(x)[:, None] for x in text_kv_BTC.chunk(2, dim=-1))
        scores = q / q.shape[-1] ** 0.5 @ k.mT
        if self.causal:
            scores = scores - EXCLUDED * (1 - torch.ones_like(scores).tril())
        to_text = (q.unflatten(0, (rows, -1)) / q.shape[-1] ** 0.5 @ k_text.mT).flatten(0, 1)
        weights = torch.cat([scores, to_text], dim=-1).softmax(-1)
        of_text = (weights[..., -self.text :].unflatten(0, (rows, -1)) @ v_text).flatten(0, 1)
        found = [_merged(x) for x in (weights[..., : -self.text] @ v + of_text, k, v)]
        if window:
            found = [self._to_raster(x, window, shift) for x in found]
        return found[0], torch.cat(found[1:], dim=-1)

    def _heads(self, x_BLC: Tensor) -> Tensor:
        return x_BLC.unflatten(-1, (-1, self.model.config.head_dim)).transpose(1, 2)

    def _to_windows(self, x_BJC: Tensor, size: int, shift: int) -> Tensor:
        """[B, G * S, C] -> [B * W, G * K, C], of frames rolled by `shift`."""
        height, width = self.layout.grid
        x = x_BJC.unflatten(1, (self.frames, height, width)).roll((-shift, -shift), (2, 3))
        x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, G, rows, size, columns, size, C]
        return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 5).flatten(0, 2)

    def _to_raster(self, x: Tensor, size: int, shift: int) -> Tensor:
        height, width = self.layout.grid
        x = x.unflatten(0, (-1, height // size, width // size)).unflatten(3, (self.frames, size, size))
        x = x.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)  # [B, G, height, width, C]
        return x.roll((shift, shift), (2, 3)).flatten(1, 3)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores * mask - EXCLUDED * (1 - mask)


def _merged(x_BNLD: Tensor) -> Tensor:
    return x_BNLD.transpose(1, 2).flatten(2)
