"""CogVideo's decoding with the cost structure of the 2022 release, as a peer of our own decoding.

What the release does at every token, in our words and over our weights: rows of keys and values, joined anew
for every layer (text | frames | this slot, keys and values each); one forward for the prompts and one for
guidance; in the windowed channel a list of places and an index_select; the temporal channel also where its
result is thrown away (first frame); the head's weights cast to float32; a sampler that sums clusters by
scatter_add and masks row by row. How it reads the given frames: `slow_prefill`.

Legend: B rows, L positions, C channels, N heads, D head dim, V image tokens, K kept clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from benchmarks import registry
from benchmarks.peers.slow_prefill import Memories, Memory, image_logits, mlp, prefill


class SlowDecoder:
    """Rows of one text length that stand at a slot, with what came before it in `memories`."""

    def __init__(self, model: Any, layout: Any, memories: Memories, next_slot: int) -> None:
        self.model, self.layout, self.memories, self.next_slot = model, layout, memories, next_slot
        self.text, self.frame_len, self.window = layout.text_len, layout.frame_len, model.config.window
        self.positions = model.position_rows(layout.slot_positions().to(model.word_embeddings.weight.device))

    @classmethod
    def behind(cls, model: Any, state: Any, rows: slice) -> SlowDecoder:
        """Where these rows of a `DecodeState` of ours stand."""
        return cls(model, state.layout, _memories_of(model, state, rows), state.next_slot)

    def rewind(self, next_slot: int) -> None:
        """Stand at `next_slot` of the same frame again."""
        back, self.next_slot = self.next_slot - next_slot, next_slot
        for memory in chain.from_iterable(self.memories):
            memory.length -= back

    def step(self, tokens_B: Tensor) -> Tensor:
        """Feed the next slot's token; logits [B, V] in float32."""
        if self.next_slot and self.next_slot % self.frame_len == 0:
            for spatial, _ in self.memories:
                spatial.length = self.text
        x_B1C = (self.model.word_embeddings(tokens_B) + self.positions[self.next_slot])[:, None]
        for layer, block in enumerate(self.model.blocks):
            attended = self._attention(layer, block.attention, block.attention_norm(x_B1C))
            x_B1C = x_B1C + block.attention_out_norm(attended)
            x_B1C = x_B1C + block.mlp_out_norm(mlp(block, block.mlp_norm(x_B1C)))
        self.next_slot += 1
        return image_logits(self.model, x_B1C[:, 0])

    def _attention(self, layer: int, attention: Any, x_B1C: Tensor) -> Tensor:
        spatial, temporal = self.memories[layer]
        q, k, v = attention.spatial.qkv(x_B1C).chunk(3, dim=-1)
        keys, values = (
            torch.cat([old, new], dim=1)
            for old, new in zip(spatial.filled().chunk(2, dim=-1), (k, v), strict=True)
        )
        out = attention.spatial.out(self._attend(q, keys, values))
        spatial.append(torch.cat([k, v], dim=-1))

        q, k, v = attention.temporal.qkv(x_B1C).chunk(3, dim=-1)
        text, frames = temporal.filled().split([self.text, temporal.length - self.text], dim=1)
        if self.window:
            frames = frames.index_select(1, torch.tensor(self._places(layer), dtype=torch.long))
        pairs = zip(text.chunk(2, dim=-1), frames.chunk(2, dim=-1), (k, v), strict=True)
        keys, values = (torch.cat([t, torch.cat([old, new], dim=1)], dim=1) for t, old, new in pairs)
        over_time = self._attend(q, keys, values)
        temporal.append(torch.cat([k, v], dim=-1))
        if self.layout.base_only:
            return out
        share = attention.mix.sigmoid()
        return out * share + attention.temporal.out(over_time) * (1 - share)

    def _attend(self, q_B1C: Tensor, k_BLC: Tensor, v_BLC: Tensor) -> Tensor:
        head_dim = self.model.config.head_dim
        q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q_B1C, k_BLC, v_BLC))
        weights = (q / head_dim**0.5 @ k.mT).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def _places(self, layer: int) -> list[int]:
        """Earlier slots of this slot's region in all frames so far, frame after frame."""
        frame, slot = divmod(self.next_slot, self.frame_len)
        region = next(slots for slots in _regions(self.model, self.layout, layer) if slot in slots)
        places = [one * self.frame_len + near for one in range(frame) for near in region]
        return places + [frame * self.frame_len + near for near in region if near < slot]


def _memories_of(model: Any, state: Any, rows: slice) -> Memories:
    """Copies of what caches of ours hold. Ours keep nothing of a temporal channel that is thrown away."""
    layout, text = state.layout, state.layout.text_len
    num_rows = len(range(*rows.indices(len(state.caches[0].spatial.values))))
    memories = []
    for layer, cache in enumerate(state.caches):
        rooms = (text + layout.frame_len, layout.length)
        spatial_room, temporal_room = (
            cache.spatial.values.new_zeros(num_rows, room, 2 * model.config.hidden_size) for room in rooms
        )
        length = text + state.next_slot % layout.frame_len
        spatial_room[:, :length] = _merged(cache.spatial.first(length), rows)
        for region, slots in enumerate([] if layout.base_only else _regions(model, layout, layer)):
            places = torch.tensor(slots)
            held = _merged(cache.temporal.first(text + layout.num_frames * len(slots), region), rows)
            temporal_room[:, :text] = held[:, :text]
            for frame in range(layout.num_frames):
                first = text + frame * len(slots)
                temporal_room[:, text + frame * layout.frame_len + places] = held[
                    :, first : first + len(slots)
                ]
        memories.append((Memory(spatial_room, length), Memory(temporal_room, text + state.next_slot)))
    return memories


def _merged(kv_BNLD: tuple[Tensor, Tensor], rows: slice) -> Tensor:
    """Keys | values of some rows [B, L, 2C]."""
    return torch.cat([x[rows].transpose(1, 2).flatten(2) for x in kv_BNLD], dim=-1)


def _regions(model: Any, layout: Any, layer: int) -> list[list[int]]:
    found = registry.module("cogvideo", "attention").region_slots(layout, model.config.window, layer)
    return [slots.tolist() for slots in found]


class SlowSampler:
    """Clusters, then tokens, as the release draws them; from the global stream of random numbers."""

    def __init__(self, labels_V: Tensor, *, temperature: float, top_k: int, temperature2: float) -> None:
        self.labels_V, self.num_clusters = labels_V, int(labels_V.max()) + 1
        self.temperature, self.top_k, self.temperature2 = temperature, top_k, temperature2

    def __call__(self, logits_BV: Tensor) -> Tensor:
        logits_BV = logits_BV / self.temperature
        sums = torch.zeros(len(logits_BV), self.num_clusters, device=logits_BV.device)
        sums.scatter_add_(1, self.labels_V.expand(len(logits_BV), -1), logits_BV.float().softmax(-1))
        masses_BK, clusters_BK = sums.topk(min(self.top_k, self.num_clusters))
        for row, masses, clusters in zip(logits_BV, masses_BK, clusters_BK, strict=True):
            row[self.labels_V != clusters[torch.multinomial(masses / masses.sum(), 1)]] = -65504.0
        return torch.multinomial((logits_BV.float() / self.temperature2).softmax(-1), 1)[:, 0]


@torch.inference_mode()
def slow_generate(
    model: Any,
    layout: Any,
    texts: Sequence[list[int]],
    given_BGS: Tensor,
    sampler: Callable[[Tensor], Tensor],
    *,
    guidance_alpha: float | None = None,
) -> Tensor:
    """The frames behind the given ones, slot by slot: all frames [B, F, S] in the order of the sequence. With
    `guidance_alpha` the second half of `texts` are the guidance texts; texts are equally long."""
    num_samples, num_given, frame_len = given_BGS.shape
    groups = 1 if guidance_alpha is None else 2
    halves = [
        torch.tensor(texts[first : first + num_samples])
        for first in range(0, groups * num_samples, num_samples)
    ]
    decoders = [
        SlowDecoder(model, layout, prefill(model, layout, text_BT, given_BGS), num_given * frame_len)
        for text_BT in halves
    ]
    tokens_BL = given_BGS.flatten(1)
    for number in range(num_given * frame_len, layout.num_frames * frame_len):
        start = number % frame_len == 0
        last_B = torch.full((num_samples,), model.config.start_of_image) if start else tokens_BL[:, -1]
        logits = [decoder.step(last_B) for decoder in decoders]
        guided = logits[0]
        if guidance_alpha is not None:
            guided = logits[1] + (logits[0] - logits[1]) * guidance_alpha
        tokens_BL = torch.cat([tokens_BL, sampler(guided)[:, None]], dim=1)
    return tokens_BL.unflatten(1, (layout.num_frames, frame_len))
