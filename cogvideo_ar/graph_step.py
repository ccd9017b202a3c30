"""A step of generation whose shapes stand still, so that it can be recorded as a CUDA graph and replayed.

A step of the released model is some two thousand kernels; started one by one from Python they can take longer
than reading its 14.6 GB of weights. The static step runs the plain blocks with another attention context:
where keys are stored, which are seen and what is added to their scores stand in tensors, filled before.
What a look sees is rounded up to a whole number of buckets and the rest excluded, so that few graphs serve a
generation and short contexts do not read the whole cache:

- the spatial channel always reads its frame's whole region: text and one frame at most. At the released size
  and with guidance that is up to 0.5 GB more than needed; buckets there too would be twice as many graphs;
- the full temporal channel reads a view of its region's first buckets;
- windows and 3D local attention gather keys by place: their regions lie elsewhere for every slot, and a view
  of each would be a graph of its own. What is copied is half a thousand keys (6.5 MB a row and layer at the
  released size, which the GPU's own cache may hold), beside 300 MB of weights of the layer.

Waves are filled up to 1, 2, 4 or 8 slots by repeating the last one, which stores the same keys once more.

Legend: B rows, P slots of a step, S keys, N heads, D head dim, V image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from cogvideo_ar.attention import excluded
from cogvideo_ar.kv_cache import KVCache, LayerCache
from shared.errors import SettingError
from shared.graphs import Capture, Replay, SharedPool

if TYPE_CHECKING:
    from cogvideo_ar.layout import SequenceLayout
    from cogvideo_ar.slot_attention import Look, Place
    from cogvideo_ar.transformer import CogVideoTransformer, DecodeState

Compile = Literal["none", "graph"]
COMPILES: tuple[str, ...] = get_args(Compile)
BUCKET = 256  # keys
RARE = 2  # a shape's first steps run uncaptured: recording costs several steps


def check_compile(chosen: str, device: torch.device, *, offload: str = "none") -> None:
    """SettingError where it does not go with the device or with where the weights wait. A graph lives as long
    as a generation, during which whole nets stay where they are, but not single blocks."""
    if chosen not in COMPILES:
        raise SettingError(f"unknown compile {chosen!r}; legal: {', '.join(COMPILES)}")
    if chosen == "graph" and device.type != "cuda":
        raise SettingError(f"compile graph needs a CUDA device, got {device.type}; legal here: none")
    if chosen == "graph" and offload == "sequential":
        raise SettingError("compile graph needs weights that stay; got offload sequential, nearest: model")


def graph_pool(device: torch.device | None = None) -> SharedPool:
    """What records the steps of one generation."""
    return SharedPool(device, warm_ups=1)  # a shape that is recorded has run, if on another stream


# ---- shapes


@dataclass(frozen=True, kw_only=True)
class Form:
    """What is fixed of a channel in a graph: how many slots look together, where, and at how many keys."""

    sizes: tuple[int, ...]  # slots of every look
    regions: tuple[int, ...]  # of every look; none: their keys are gathered
    num_keys: int


def padded_size(num_slots: int) -> int:
    """The power of two that a wave is filled up to."""
    return 1 << (num_slots - 1).bit_length()


def forms_of(channels: Sequence[Sequence[Look]], caches: Sequence[KVCache]) -> tuple[Form, ...]:
    """The spatial channel's and those of the kinds of temporal layers; `caches` are one of each."""
    (spatial, *temporal), (lanes, *others) = channels, caches
    longest = max((_num_keys(look) for looks in temporal for look in looks), default=0)
    room = max((max(_region_sizes(cache)) for cache in others), default=0)
    seen = min(-(-longest // BUCKET) * BUCKET, room)
    forms = [_form(spatial, max(_region_sizes(lanes)), view=True)]
    for looks, cache in zip(temporal, others, strict=True):
        forms.append(_form(looks, seen, view=len(_region_sizes(cache)) == 1))
    return tuple(forms)


def _form(looks: Sequence[Look], num_keys: int, *, view: bool) -> Form:
    sizes = [look.slots for look in looks]
    sizes[-1] += padded_size(sum(sizes)) - sum(sizes)
    view = view and all(isinstance(look.keys, int) for look in looks)
    return Form(
        sizes=tuple(sizes), regions=tuple(look.region for look in looks) if view else (), num_keys=num_keys
    )


def _num_keys(look: Look) -> int:
    return look.keys if isinstance(look.keys, int) else len(look.keys)


def _region_sizes(cache: KVCache) -> list[int]:
    return [end - start for start, end in pairwise(cache.starts)]


# ---- attention


class StaticChannel:
    """One channel of a static step: the buffers that say what it does, and what it does."""

    def __init__(self, form: Form, places_P: Tensor, like: Tensor) -> None:
        self.form, self.places_P = form, places_P
        wide, rows = torch.promote_types(like.dtype, torch.float32), like.shape[0]
        self.biases = [like.new_zeros(rows, 1, size, form.num_keys, dtype=wide) for size in form.sizes]
        self.steps_S = torch.arange(form.num_keys, device=like.device)
        self.seen = [] if form.regions else [torch.zeros_like(self.steps_S) for _ in form.sizes]

    def places(self, looks: Sequence[Look], cache: KVCache) -> list[int]:
        """Where the keys of all slots are stored, counted over all regions."""
        places = [cache.starts[look.region] + look.position + i for look in looks for i in range(look.slots)]
        return places + [places[-1]] * (len(self.places_P) - len(places))

    def aim(self, looks: Sequence[Look], cache: KVCache) -> None:
        """Fill the buffers; those of the places are filled together with others."""
        for bias, look in zip(self.biases, looks, strict=True):
            _fill_bias(bias, look)
        for seen_S, look in zip(self.seen, looks, strict=bool(self.seen)):
            start = cache.starts[look.region]
            if isinstance(look.keys, int):  # what lies behind the region is excluded by the bias
                torch.add(self.steps_S, start, out=seen_S).clamp_(max=cache.starts[-1] - 1)
            else:
                seen_S.zero_()[: len(look.keys)].copy_(look.keys + start)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> Tensor:
        """[B, N, P, D]; all keys are stored first, as a slot may see one that is fed beside it."""
        for stored, new in zip(cache.first(cache.starts[-1]), (k, v), strict=True):
            stored.index_copy_(2, self.places_P, new)
        outs = []
        for i, q_look in enumerate(q.split(self.form.sizes, dim=2)):
            if self.form.regions:
                seen = cache.first(self.form.num_keys, self.form.regions[i])
            else:
                seen = cache.take(self.seen[i])
            outs.append(attend_wide(q_look, *seen, self.biases[i]))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _fill_bias(bias_B1PS: Tensor, look: Look) -> None:
    num_keys = _num_keys(look)
    shown, given = bias_B1PS[..., :num_keys], look.bias
    if given is None:
        shown.zero_()
    elif given.shape[-2] == 1:
        shown.copy_(given)
    else:  # the slots that fill up the wave see what the last one sees
        shown[:, :, : look.slots].copy_(given)
        shown[:, :, look.slots :].copy_(given[..., -1:, :])
    bias_B1PS[..., num_keys:].fill_(excluded(bias_B1PS.dtype))


def attend_wide(q_BNPD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, bias_B1PS: Tensor) -> Tensor:
    """`attend` for few queries as products, which share a row's keys out to the whole device (kernels that
    take a bias do not); scores and softmax in float32 or wider."""
    scores = torch.add(bias_B1PS, _wide_product(q_BNPD, k_BNSD.mT), alpha=q_BNPD.shape[-1] ** -0.5)
    return scores.softmax(-1).to(v_BNSD.dtype) @ v_BNSD


def _wide_product(a_BNPD: Tensor, b_BNDS: Tensor) -> Tensor:
    """The product in float32 or wider, without a wider copy of `b` where the device knows how."""
    wide = torch.promote_types(a_BNPD.dtype, torch.float32)
    if wide == a_BNPD.dtype or a_BNPD.device.type == "cpu":
        return a_BNPD.to(wide) @ b_BNDS.to(wide)
    product = torch.bmm(a_BNPD.flatten(0, 1), b_BNDS.flatten(0, 1), out_dtype=wide)
    return product.unflatten(0, a_BNPD.shape[:2])


# ---- the step


class StaticStep:
    """The step of one shape; also the attention context of its blocks. `fill`, then `run`."""

    num_text = 0

    def __init__(self, model: CogVideoTransformer, state: DecodeState, forms: Sequence[Form], rows: int):
        self.model, self.caches, self.positions = model, state.caches, state.positions
        self.base_only, size = state.context.base_only, sum(forms[0].sizes)
        like = state.positions.new_empty(rows, 0)
        self.tokens_BP = torch.zeros(rows, size, dtype=torch.long, device=like.device)
        self.numbers = torch.zeros(1 + len(forms), size, dtype=torch.long, device=like.device)
        self.channels = [
            StaticChannel(form, places_P, like)
            for form, places_P in zip(forms, self.numbers[1:], strict=True)
        ]
        self.uses = 0

    def fill(
        self,
        tokens_BP: Tensor,
        slots: list[int],
        channels: Sequence[Sequence[Look]],
        caches: Sequence[KVCache],
    ) -> None:
        """Say what the next step does; `slots` are counted over all frames."""
        extra = self.tokens_BP.shape[1] - len(slots)
        self.tokens_BP[:, : len(slots)].copy_(tokens_BP)
        if extra:
            self.tokens_BP[:, len(slots) :].copy_(tokens_BP[:, -1:])
        numbers = [slots + slots[-1:] * extra]
        for channel, looks, cache in zip(self.channels, channels, caches, strict=True):
            channel.aim(looks, cache)
            numbers.append(channel.places(looks, cache))
        # pinned memory is not waited for, and not given to others before it has been read
        sent = torch.tensor(numbers, pin_memory=self.numbers.is_cuda)
        self.numbers.copy_(sent, non_blocking=True)

    def run(self) -> Tensor:
        """Logits [B, P, V]. Reads and writes the same memory every time; run twice it does the same."""
        model = self.model
        x_BPC = model.word_embeddings(self.tokens_BP) + self.positions.index_select(0, self.numbers[0])
        for block, cache in zip(model.blocks, self.caches, strict=True):
            x_BPC = block(x_BPC, self, cache)
        return model.image_logits(model.final_norm(x_BPC))

    def spatial(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None) -> Tensor:
        assert cache is not None
        return self.channels[0](q, k, v, cache.spatial)

    def temporal(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, layer: int) -> Tensor:
        assert cache is not None
        kinds = self.channels[1:]
        return kinds[layer % len(kinds)](q, k, v, cache.temporal)


class GraphStep:
    """All steps of one generation: static ones, each recorded when its shape comes up again."""

    def __init__(self, model: CogVideoTransformer, capture: Capture, *, num_given: int) -> None:
        self.model, self.capture, self.num_given = model, capture, num_given
        self.steps: dict[tuple[Form, ...], StaticStep] = {}
        self.recorded: dict[tuple[Form, ...], tuple[Tensor, Replay]] = {}

    def __call__(self, tokens_BP: Tensor, wave: tuple[Place, ...], state: DecodeState) -> Tensor:
        """Feed a wave that `state.context` aims at; logits [B, P, V] in the model's type."""
        context, caches = state.context, state.caches
        if not self.steps:
            clear_unwritten(caches, state.layout, self.num_given)
        channels = [context.spatial_looks, *context.temporal_looks[: len(caches)]]
        stores = [caches[0].spatial, *(cache.temporal for cache in caches[: len(channels) - 1])]
        forms = forms_of(channels, stores)
        if forms not in self.steps:
            self.steps[forms] = StaticStep(self.model, state, forms, len(tokens_BP))
        slots = [frame * state.layout.frame_len + slot for frame, slot in wave]
        self.steps[forms].fill(tokens_BP, slots, channels, stores)
        return self._run(forms)[:, : len(wave)]

    def _run(self, forms: tuple[Form, ...]) -> Tensor:
        step = self.steps[forms]
        if step.uses < RARE:
            step.uses += 1
            return step.run()
        if forms not in self.recorded:
            self.recorded[forms] = self.capture(step.run)
        result, replay = self.recorded[forms]
        replay()
        return result.clone()  # the next replay, of whichever graph, may write over it


def clear_unwritten(caches: Sequence[LayerCache], layout: SequenceLayout, num_given: int) -> None:
    """Zero what the prefill has left of the caches: an excluded key counts nothing, but it must be finite."""
    text, frames = layout.text_len, layout.num_frames

    def clear(cache: KVCache, written: Callable[[int], int]) -> None:
        for region, size in enumerate(_region_sizes(cache)):
            for part in cache.first(size, region):
                part[:, :, written(size) :].zero_()

    for cache in caches:
        clear(cache.spatial, lambda size: text)
        clear(cache.temporal, lambda size: text + num_given * ((size - text) // frames))
