from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogvideo_ar.attention import FullAttention
from cogvideo_ar.config import Oddities, TransformerConfig
from cogvideo_ar.kv_cache import KVCache
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
from tests.cogvideo_ar.tiny import NUM_IMAGE_TOKENS, configs, tiny_config, wild_model

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


def visible(layout: SequenceLayout, window: int, shifted: bool) -> tuple[Tensor, Tensor]:
    """Who sees whom, slot by slot from the written rule: (spatial, temporal), bool [L, L]."""
    regions = region_ids(layout.grid, window, shifted).tolist()
    spatial = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    temporal = spatial.clone()
    places = [(None, i) for i in range(layout.text_len)]
    places += [(f, i) for f in range(layout.num_frames) for i in range(layout.frame_len)]
    for a, (frame, slot) in enumerate(places):
        for b, (key_frame, key_slot) in enumerate(places):
            if frame is None or key_frame is None:
                spatial[a, b] = temporal[a, b] = key_frame is None
                continue
            given = layout.num_bidirectional
            both_given = frame < given and key_frame < given
            causal = frame == key_frame and key_slot <= slot
            spatial[a, b] = frame == key_frame and (both_given or causal)
            earlier = key_frame < frame and not frame < given
            temporal[a, b] = (both_given or earlier or causal) and regions[slot] == regions[key_slot]
    return spatial, temporal


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@QUICK
@given(config=configs(), make=LAYOUTS, text_len=st.integers(1, 3), padded=st.booleans())
def test_attention_equals_the_dense_rule(config, make, text_len, padded):
    layout = make(config, text_len)
    q, k, v = torch.randn(3, 2, 2, layout.length, 4, dtype=torch.float64).unbind(0)
    valid = torch.ones(2, text_len, dtype=torch.bool)
    valid[1, : text_len - 1] = not padded
    context = FullAttention(
        layout,
        window=config.window,
        like=torch.empty(2, layout.length, 1, dtype=torch.float64),
        text_valid_BT=valid if padded else None,
    )
    keys = torch.cat([valid, torch.ones(2, layout.length - text_len, dtype=torch.bool)], 1)[:, None, None]
    for layer in range(2):
        spatial, temporal = visible(layout, config.window, bool(layer % 2))
        expected = dense(q, k, v, spatial & keys)
        torch.testing.assert_close(context.spatial(q, k, v, None), expected)
        if not layout.base_only:
            expected = dense(q, k, v, temporal & keys)[:, :, text_len:]
            torch.testing.assert_close(context.temporal(q, k, v, None, layer), expected)


@QUICK
@given(config=configs(), make=LAYOUTS, text_len=st.integers(1, 3), weight=st.sampled_from([0.0, 1.4]))
def test_cached_equals_uncached(config, make, text_len, weight):
    """Prefill and steps give the training forward's logits, padded text and text weight included."""
    layout, model = make(config, text_len), wild_model(config)
    text, frames = random_rows(config, layout, rows=2)
    valid = torch.ones_like(text, dtype=torch.bool)
    valid[1, : text_len - 1] = False
    tokens = inputs(config, text, frames)
    options = {"text_valid_BT": valid, "text_weight": weight}
    with torch.inference_mode():
        full = model(tokens, layout, **options)
        num_given = layout.num_given * layout.frame_len
        slots = tokens[:, layout.frames]
        state = model.start(text, slots[:, :num_given], layout, **options)
        steps = [model.step(token, state) for token in slots[:, num_given:].unbind(1)]
    torch.testing.assert_close(torch.stack(steps, 1), full[:, num_given:], atol=1e-9, rtol=1e-9)


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


def test_cache_regions():
    cache = KVCache(1, 1, 2, [2, 3], torch.empty(0))
    one, two = torch.ones(1, 1, 1, 2), torch.full((1, 1, 2, 2), 2.0)
    cache.put(one, one, 0)
    cache.put(two, -two, 1, region=1)
    assert cache.first(1)[0].tolist() == one.tolist()
    k, v = cache.take(torch.tensor([2, 1]), region=1)
    assert k.tolist() == two.tolist() and v.tolist() == (-two).tolist()
    with pytest.raises(ValueError, match="region of 2 positions cannot hold 3"):
        cache.put(two, two, 1)
