from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogvideo_ar.attention import relaxed_attend
from cogvideo_ar.config import Oddities, TransformerConfig
from cogvideo_ar.kv_cache import ColumnCache, KVCache
from cogvideo_ar.layout import (
    SequenceLayout,
    frame_slots,
    image_layout,
    interpolation_layout,
    keyframe_layout,
    region_ids,
    window_slots,
)
from cogvideo_ar.training.objective import frame_losses, token_loss, token_losses
from cogvideo_ar.transformer import CogVideoTransformer
from shared.attention import attend
from tests.cogvideo_ar.tiny import NUM_IMAGE_TOKENS, configs, kind_of, tiny_config, wild_model

LAYOUTS = st.sampled_from([image_layout, keyframe_layout, interpolation_layout])
QUICK = settings(max_examples=15, deadline=None)


def random_rows(
    config: TransformerConfig, layout: SequenceLayout, rows: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Text [B, T] and frames in the order of the sequence [B, F, S]."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(NUM_IMAGE_TOKENS, config.vocab_size, (rows, layout.text_len), generator=generator)
    shape = (rows, layout.num_frames, layout.frame_len)
    return text, torch.randint(0, NUM_IMAGE_TOKENS, shape, generator=generator)


def inputs(config: TransformerConfig, text: Tensor, frames: Tensor) -> Tensor:
    return torch.cat([text, frame_slots(frames, config.start_of_image)], dim=1)


@QUICK
@given(config=configs(), make=LAYOUTS, data=st.data())
def test_later_tokens_never_change_earlier_logits(config, make, data):
    layout, model = make(config, 2), wild_model(config)
    text, frames = random_rows(config, layout, rows=1)
    first = layout.num_given * layout.frame_len
    if first == frames[0].numel():
        return
    changed = data.draw(st.integers(first, frames[0].numel() - 1))
    other = frames.clone().flatten(1)
    other[0, changed] = (other[0, changed] + 1) % NUM_IMAGE_TOKENS
    with torch.inference_mode():
        a = model(inputs(config, text, frames), layout)
        b = model(inputs(config, text, other.view_as(frames)), layout)
    assert torch.equal(a[:, : changed + 1], b[:, : changed + 1])
    is_last_of_frame = (changed + 1) % layout.frame_len == 0
    assert is_last_of_frame == torch.equal(a, b)  # a frame's last token is seen by nobody


def test_padding_changes_nothing():
    config = tiny_config(temporal="window", window=2)
    model, short = wild_model(config), keyframe_layout(config, 2)
    text, frames = random_rows(config, short, rows=2)
    long = keyframe_layout(config, 5)
    padded = torch.cat([torch.full((2, 3), config.pad_token), text], dim=1)
    valid = torch.arange(5).expand(2, 5) >= 3
    with torch.inference_mode():
        a = model(inputs(config, text, frames), short)
        b = model(inputs(config, padded, frames), long, text_valid_BT=valid)
        c = model(inputs(config, padded, frames), long)
    torch.testing.assert_close(a, b)
    assert (a - c).abs().max() > 0.1


def test_text_of_nothing_but_padding_is_finite():
    config = tiny_config()
    layout = keyframe_layout(config, 3)
    text, frames = random_rows(config, layout, rows=2)
    valid = torch.tensor([[True] * 3, [False] * 3])
    logits = CogVideoTransformer(config)(inputs(config, text, frames), layout, text_valid_BT=valid)
    assert bool(logits.isfinite().all())


@torch.inference_mode()
def test_quirk_temporal_text_bias_decode_only():
    """The released prefill leaves the text weight out of the temporal channel: only w != 0 shows it."""
    config = tiny_config()
    model, layout = wild_model(config), keyframe_layout(config, 3)
    text, frames = random_rows(config, layout, rows=1)
    slots = frame_slots(frames, config.start_of_image)[:, : layout.frame_len]

    def next_logits(weight: float, release: bool) -> Tensor:
        oddities = Oddities(temporal_text_bias_decode_only=release)
        state = model.start(text, slots, layout, text_weight=weight, oddities=oddities)
        return model.step(torch.tensor([config.start_of_image]), state)

    assert torch.equal(next_logits(0.0, True), next_logits(0.0, False))
    assert (next_logits(1.4, True) - next_logits(1.4, False)).abs().max() > 1e-3


def test_image_stage_uses_the_base_alone():
    config = tiny_config()
    model, layout = CogVideoTransformer(config), image_layout(config, 2)
    text, frames = random_rows(config, layout, rows=2)
    loss = token_loss(model(inputs(config, text, frames), layout), frames, torch.ones_like(frames))
    loss.backward()
    assert all(p.grad is None for _, p in model.temporal_parameters())
    assert all(p.grad is not None for _, p in model.base_parameters())
    base = CogVideoTransformer(tiny_config(temporal="none"))
    base.load_state_dict({name: p.detach() for name, p in model.base_parameters()}, strict=True)
    tokens = inputs(config, text, frames)
    assert torch.equal(base(tokens, layout), model(tokens, layout))


def test_temporal_channel_starts_from_the_base():
    model = CogVideoTransformer(tiny_config())
    model.init_temporal_from_base()
    attention = model.blocks[0].attention
    assert torch.equal(attention.temporal.qkv.weight, attention.spatial.qkv.weight)
    assert not torch.equal(attention.temporal.out.weight, attention.spatial.out.weight)
    offset, extra = model.config.image_position_offset, model.extra_position_embeddings.weight
    assert torch.equal(extra[16:32], model.position_embeddings.weight[offset : offset + 16])
    model.init_temporal_from_base(copy_out=True)
    assert torch.equal(attention.temporal.out.weight, attention.spatial.out.weight)


def test_initialisation():
    config = tiny_config(num_layers=8, head_dim=32, vocab_size=400)
    model = CogVideoTransformer(config)
    block = model.blocks[3]
    assert model.word_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attention.temporal.out.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attention.spatial.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert not block.mlp.up.bias.any() and not block.attention.mix.any()


def test_dropout_only_in_training():
    config = tiny_config(hidden_dropout=0.2, attention_dropout=0.2)
    model, layout = CogVideoTransformer(config), keyframe_layout(config, 2)
    tokens = inputs(config, *random_rows(config, layout, rows=1))
    assert not torch.equal(model(tokens, layout), model(tokens, layout))
    model.eval()
    assert torch.equal(model(tokens, layout), model(tokens, layout))


def test_training_works_after_inference():
    """Kept window tables must not be inference tensors, though inference asks for them first here."""
    region_ids.cache_clear()
    window_slots.cache_clear()
    config = tiny_config(temporal="window", window=2, grid=(4, 2), num_extra_positions=32)
    model, layout = CogVideoTransformer(config), keyframe_layout(config, 2)
    tokens = inputs(config, *random_rows(config, layout, rows=1))
    with torch.inference_mode():
        model(tokens, layout)
    model(tokens, layout).sum().backward()


@pytest.mark.parametrize("kind", ["full", "window", "local"])
def test_pb_relax_is_the_plain_softmax(kind: str):
    """In training, loss and gradients are those without it; in evaluation it is not used."""
    config = tiny_config(**kind_of(kind))
    layout, grads = interpolation_layout(config, 2), []
    text, frames = random_rows(config, layout, rows=2)
    valid = torch.tensor([[True, True], [False, True]])
    for pb_relax in (False, True):
        model = wild_model(replace(config, pb_relax=pb_relax)).train()
        logits = model(inputs(config, text, frames), layout, text_valid_BT=valid)
        token_loss(logits, frames, torch.ones_like(frames)).backward()
        grads.append([logits, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-9, rtol=1e-9)


def test_pb_relax_keeps_float16_finite():
    """Scores beyond the largest float16, as the released training meets them."""
    q, k, v = (torch.randn(1, 1, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    q, k = q.half() * 400, k.half() * 400
    assert not bool((q @ k.mT).isfinite().all())
    bias = torch.zeros(5, 5, dtype=torch.float16).masked_fill(torch.ones(5, 5).triu(1) > 0, -10000)
    relaxed = relaxed_attend(q, k, v.half(), bias=bias * 2)
    expected = attend(q.double(), k.double(), v.double(), bias=bias.double() * 1e6)
    assert bool(relaxed.isfinite().all())
    torch.testing.assert_close(relaxed.double(), expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"extent": (2, 2, 2)}, "needs temporal"),
        ({"temporal": "local"}, "extent must be >= 1"),
        ({"temporal": "local", "extent": (2, 0, 2)}, "extent must be >= 1"),
        ({"temporal": "local", "extent": (1, 1, 1), "window": 2}, "window 2 needs"),
    ],
)
def test_illegal_extents_are_refused(changes: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        tiny_config(**changes)


def test_wrong_length_is_refused():
    config = tiny_config()
    with pytest.raises(ValueError, match="expected 82 tokens per row, got 81"):
        CogVideoTransformer(config)(torch.zeros(1, 81, dtype=torch.long), keyframe_layout(config, 2))


def test_losses():
    layout = interpolation_layout(tiny_config(), 1)
    labels = torch.randint(0, 7, (2, 5, 16))
    logits = torch.randn(2, 80, 7)
    losses = token_losses(logits, labels)
    expected = -logits.view(2, 5, 16, 7).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(losses, expected)
    mask = torch.zeros(2, 5, 16, dtype=torch.bool)
    mask[0, 3] = True
    torch.testing.assert_close(token_loss(logits, labels, mask), losses[0, 3].mean())
    means = frame_losses(losses, layout)
    assert list(means) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(means[1], losses[:, 3].mean())


@pytest.mark.parametrize("kind", [KVCache, ColumnCache])
def test_cache_regions(kind: type[KVCache]):
    cache = kind(1, 1, 2, [2, 3], torch.empty(0))
    one, two = torch.ones(1, 1, 1, 2), torch.full((1, 1, 2, 2), 2.0)
    cache.put(one, one, 0)
    cache.put(two, -two, 1, region=1)
    assert cache.first(1)[0].tolist() == one.tolist()
    k, v = cache.take(torch.tensor([2, 1]), region=1)
    assert k.tolist() == two.tolist() and v.tolist() == (-two).tolist()
    with pytest.raises(ValueError, match="region of 2 positions cannot hold 3"):
        cache.put(two, two, 1)


@torch.no_grad()
def test_a_cache_of_columns_holds_what_the_plain_one_holds():
    """Whatever is written, in whatever pieces: over the borders of blocks, again, to some rows only."""
    random, sizes = torch.Generator().manual_seed(0), [150, 64, 3]
    plain, columns = (kind(3, 2, 8, sizes, torch.zeros(0)) for kind in (KVCache, ColumnCache))
    for size, region in ((150, 0), (64, 1), (3, 2)):
        everything = torch.randn(2, 3, 2, size, 8, generator=random)
        for first, end in ((0, size), (size // 2 - 1, size - 1), (size - 1, size)):
            rows = slice(first % 2, None)
            for cache in (plain, columns):
                cache.of_rows(rows).put(*(x[rows, :, first:end] for x in everything), first, region)
    for region, size in enumerate(sizes):
        for used in {1, size // 2 + 1, size}:
            for one, other in zip(plain.first(used, region), columns.first(used, region), strict=True):
                assert torch.equal(one, other)
            q = torch.randn(3, 2, 2, 8, generator=random)
            wanted = q @ plain.first(used, region)[0].mT
            torch.testing.assert_close(columns.scores(q, used, region), wanted)
        positions = torch.randint(size, (5,), generator=random)
        for one, other in zip(plain.take(positions, region), columns.take(positions, region), strict=True):
            assert torch.equal(one, other)
    assert columns.nbytes == plain.nbytes + 3 * 2 * 8 * 4 * ((192 - 150) + (64 - 3))
    other = columns.with_regions([5, 70])
    assert type(other) is ColumnCache and other.blocks == [0, 1, 3]
