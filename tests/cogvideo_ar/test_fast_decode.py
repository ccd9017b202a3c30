"""The quick step on the CPU: the same function as the plain blocks, taken only where it may be."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cogvideo_ar import fast_decode, transformer
from cogvideo_ar.config import cogvideo
from cogvideo_ar.costs import cache_bytes, copied_bytes, transformer_params
from cogvideo_ar.generation import generate_tokens
from cogvideo_ar.kv_cache import ColumnCache
from cogvideo_ar.layout import frame_slots, image_layout, interpolation_layout, keyframe_layout
from cogvideo_ar.sampling import CogLMSampler
from cogvideo_ar.slot_attention import attend_slot
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideo_ar.wavefront import generate_tokens_in_waves
from shared.attention import attend
from shared.cpu_attention import bags_take
from shared.memory import peak_bytes
from tests.cogvideo_ar.tiny import NUM_IMAGE_TOKENS, configs, kind_of, tiny_config, wild_model

KINDS = ["full", "window", "local"]


@pytest.fixture(autouse=True)
def small_nets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_decode, "FEWEST_CHANNELS", 1)


def calm_model(config: Any, dtype: torch.dtype = torch.float32) -> CogVideoTransformer:
    """Wide enough to show a mistake, and not so wide that rounding grows from layer to layer."""
    model = wild_model(config)
    for block in model.blocks:
        for linear in (module for module in block.modules() if isinstance(module, nn.Linear)):
            linear.weight.data *= 0.5
    return model.to(dtype)


@torch.inference_mode()
def decoded(model: CogVideoTransformer, layout: Any, *, quick: bool, padded: bool = False) -> Tensor:
    """Logits of all slots behind the given frames, fed with fixed tokens, of two rows [B, slots, V]."""
    random = torch.Generator().manual_seed(3)
    frames = torch.randint(NUM_IMAGE_TOKENS, (2, layout.num_frames, layout.frame_len), generator=random)
    slots = frame_slots(frames, model.config.start_of_image)
    first = layout.num_given * layout.frame_len
    text = torch.randint(26, 40, (2, layout.text_len), generator=random)
    valid = torch.arange(layout.text_len) >= torch.tensor([[0], [layout.text_len - 1]]) if padded else None
    weight = 0.0 if padded else 1.4
    with mock.patch.object(transformer, "applies", fast_decode.applies if quick else lambda model: False):
        state = model.start(text, slots[:, :first], layout, text_valid_BT=valid, text_weight=weight)
    assert (state.quick is not None) == (quick and fast_decode.applies(model))
    columns = state.quick is not None and bags_take(model.word_embeddings.weight.dtype)
    assert isinstance(state.caches[0].spatial, ColumnCache) == columns
    assert isinstance(state.caches[0].temporal, ColumnCache) == (columns and not any(model.config.extent))
    return torch.stack([model.step(tokens, state) for tokens in slots[:, first:].unbind(1)], dim=1)


@settings(max_examples=12, deadline=None)
@given(
    config=configs(),
    make=st.sampled_from([image_layout, keyframe_layout, interpolation_layout]),
    padded=st.booleans(),
)
def test_logits_are_the_plain_ones_to_rounding(config: Any, make: Any, padded: bool) -> None:
    layout, model = make(config, 3), calm_model(config)
    assert fast_decode.applies(model) is False  # with gradients
    quick, plain = (decoded(model, layout, quick=quick, padded=padded) for quick in (True, False))
    exact = decoded(model.double(), layout, quick=False, padded=padded)
    assert (quick - exact).norm() <= 3 * (plain - exact).norm() + 1e-6 * exact.norm()


def test_bfloat16_rounds_no_more_than_the_plain_blocks() -> None:
    config = tiny_config(num_heads=4, head_dim=16)
    layout, model = keyframe_layout(config, 3), calm_model(config, torch.bfloat16)
    quick, plain = (decoded(model, layout, quick=quick) for quick in (True, False))
    exact = decoded(model.double(), layout, quick=False)
    assert (quick - exact).norm() <= 1.3 * (plain - exact).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_plain_ones_and_those_of_waves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(**kind_of(kind))
    layout, model = interpolation_layout(config, 2), calm_model(config)
    given_frames = torch.zeros(2, layout.num_given, layout.frame_len, dtype=torch.long)
    sampler = CogLMSampler(torch.arange(NUM_IMAGE_TOKENS) % 5)
    uniforms = torch.rand(2, 32, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def tokens(generate: Any) -> Tensor:
        texts = [[30, 31]] * 2 + [[32, 33]] * 2
        draw = lambda logits, number: sampler.sample(logits, uniforms[:, number])  # noqa: E731
        return generate(model, layout, texts, given_frames, draw, guidance_alpha=3.0)

    quick, waves = tokens(generate_tokens), tokens(generate_tokens_in_waves)
    monkeypatch.setattr(fast_decode, "MOST_BYTES", 0)
    assert torch.equal(quick, tokens(generate_tokens)) and torch.equal(quick, waves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slots_attention_is_the_kernels(dtype: torch.dtype) -> None:
    q, k, v = (
        torch.randn(2, 3, size, 16, generator=torch.Generator().manual_seed(size)).to(dtype)
        for size in (1, 9, 10)
    )
    v, bias = v[:, :, :9], torch.randn(2, 1, 1, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    for given_bias in (None, bias):
        exact = attend(q.double(), k.double(), v.double(), bias=None if given_bias is None else bias.double())
        got = attend_slot(q, k, v, given_bias).double()
        assert (got - exact).norm() < (2e-6 if dtype == torch.float32 else 2e-2) * exact.norm()


# ---- where it is taken


@torch.inference_mode()
def test_where_it_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = calm_model(tiny_config())
    assert fast_decode.applies(model)
    assert not fast_decode.applies(model.train()) and fast_decode.applies(model.eval())
    assert not fast_decode.applies(model.double()) and fast_decode.applies(model.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert not fast_decode.applies(model)
    handle = model.blocks[1].mlp.up.register_forward_hook(lambda *args: None)
    assert not fast_decode.applies(model)
    handle.remove()
    monkeypatch.setattr(fast_decode, "FEWEST_CHANNELS", 9)
    assert not fast_decode.applies(model)


@torch.inference_mode()
def test_another_kind_of_linear_is_left_to_itself() -> None:
    class Adapted(nn.Linear):
        pass

    model = calm_model(tiny_config())
    model.blocks[0].mlp.up = Adapted(8, 32)
    assert not fast_decode.applies(model)


def test_a_change_of_the_weights_is_seen_by_the_next_generation() -> None:
    config = tiny_config()
    layout, model = keyframe_layout(config, 2), calm_model(config)
    before = decoded(model, layout, quick=True)
    model.blocks[0].mlp.up.weight.data *= 2
    after = decoded(model, layout, quick=True)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, decoded(model, layout, quick=False), atol=1e-4, rtol=1e-4)


# ---- memory


def test_a_large_net_is_not_copied() -> None:
    """The released one, of which a second copy would be as large again."""
    with torch.device("meta"):
        model = CogVideoTransformer(cogvideo().keyframes).half()
    assert fast_decode.packed_bytes(model) > 10 * fast_decode.MOST_BYTES


@pytest.mark.parametrize("channel", KINDS)
def test_the_caches_of_the_copies_have_the_predicted_bytes(channel: str) -> None:
    model = calm_model(config := tiny_config(num_layers=2, num_heads=8, head_dim=16, **kind_of(channel)))
    layout = keyframe_layout(config, 3)
    state = model.start(torch.full((2, 3), 30), torch.zeros(2, layout.frame_len, dtype=torch.long), layout)
    held = sum(cache.spatial.nbytes + cache.temporal.nbytes for cache in state.caches)
    assert held == cache_bytes(config, layout, 2, 4, 1, columns=bags_take(torch.float32))
    assert cache_bytes(config, layout, 2, 4, 1, columns=True) > cache_bytes(config, layout, 2, 4, 1)


def test_the_copies_are_as_large_as_what_they_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = keyframe_layout(config := tiny_config(num_heads=8, head_dim=16), 3)
    model, text = calm_model(config), torch.full((1, 3), 30)
    given_slots = torch.zeros(1, layout.frame_len, dtype=torch.long)

    def held() -> int:
        states = []
        return peak_bytes(lambda: states.append(model.start(text, given_slots, layout)))

    copied = held()
    monkeypatch.setattr(fast_decode, "MOST_BYTES", 0)
    assert copied - held() == pytest.approx(fast_decode.packed_bytes(model), rel=0.1)


def test_the_plan_of_a_small_net_on_the_cpu_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = calm_model(config := tiny_config(num_heads=8, head_dim=16))
    whole, first = (copied_bytes(config, torch.float32, base_only=base_only) for base_only in (False, True))
    assert whole == fast_decode.packed_bytes(model) > first > 0
    assert copied_bytes(config, torch.float16, base_only=False) == 0
    monkeypatch.setattr(fast_decode, "FEWEST_CHANNELS", config.hidden_size + 1)
    assert copied_bytes(config, torch.float32, base_only=False) == 0
    monkeypatch.setattr(fast_decode, "FEWEST_CHANNELS", 1)
    monkeypatch.setattr(fast_decode, "MOST_BYTES", whole - 1)
    assert copied_bytes(config, torch.float32, base_only=True) == 0


def test_decoding_without_copies_holds_little_beside_weights_and_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measured; what the cost model says of the 9B model is in `test_costs`."""
    monkeypatch.setattr(fast_decode, "MOST_BYTES", 0)
    config = tiny_config(num_layers=6, num_heads=8, head_dim=16)
    layout, model = keyframe_layout(config, 3), CogVideoTransformer(config).eval()
    given_frames = torch.zeros(2, 1, layout.frame_len, dtype=torch.long)

    def run() -> Tensor:
        return generate_tokens(model, layout, [[30] * 3] * 2, given_frames, lambda x, _: x.argmax(1))

    run()  # what torch keeps for itself
    weights = 4 * transformer_params(config)[0]
    cache = cache_bytes(config, layout, 2, 4, 1)
    assert weights + peak_bytes(run) <= 1.1 * (weights + cache)
