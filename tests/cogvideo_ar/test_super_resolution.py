from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogvideo_ar.config import CogLMConfig, PromptTemplates, SamplingConfig, SuperResolutionConfig
from cogvideo_ar.super_resolution.direct import (
    build_direct_sampler,
    direct_hidden,
    direct_inputs,
    enlarge_frames,
    enlarge_videos,
)
from cogvideo_ar.super_resolution.iterative import (
    TopKSampler,
    build_pass_samplers,
    iterative_hidden,
    iterative_inputs,
    refine_frames,
    refine_videos,
)
from cogvideo_ar.super_resolution.local_attention import OUTSIDE, local_scores, local_values, window_places
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer, prefix_mask
from shared.config_io import from_plain, to_plain
from shared.errors import SettingError

QUICK = settings(max_examples=10, deadline=None)


def tiny(kind: str = "direct", **changes: Any) -> SuperResolutionConfig:
    """2 x 3 coarse cells, 6 x 6 fine ones."""
    sizes: dict[str, Any] = {
        "kind": kind,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 4,
        "text_len": 5,
        "vocab_size": 40,
        "num_image_tokens": 23,
        "start_of_image": 24,
        "num_positions": 30,
        "coarse_position_offset": 9,
        "coarse_grid": (2, 3),
        "fine_grid": (6, 6),
        "coarse_kernel": (3, 3),
        "fine_kernel": (5, 3),
        "draw": CogLMConfig(temperature=1.0, top_k=3, temperature2=0.6),
        "pass_top_k": (9, 5, 5, 3, 3, 2),
        "max_batch": 3,
    }
    return SuperResolutionConfig(**sizes | changes)


def wild(config: SuperResolutionConfig, seed: int = 0) -> SuperResolutionTransformer:
    """Float64 weights so wide that any change of visibility shows."""
    generator = torch.Generator().manual_seed(seed)
    model = SuperResolutionTransformer(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(noise * 0.5 + (0.0 if parameter.ndim > 1 else 0.3))
    return model


def cells(config: SuperResolutionConfig, rows: int, *, fine: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = config.fine_len if fine else config.coarse_len
    return torch.randint(config.num_image_tokens, (rows, size), generator=generator)


# ---- local attention


def neighbours(
    query: tuple[int, int], ratio: tuple[int, int], kernel: tuple[int, int]
) -> list[tuple[int, int]]:
    """Key cells of a query's window, by the written rule."""
    top, left = (place // r - side // 2 for place, r, side in zip(query, ratio, kernel, strict=True))
    return [(top + row, left + column) for row, column in window_places(kernel)]


@QUICK
@given(
    keys=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    ratio=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    shared=st.integers(1, 2),
)
def test_local_attention_equals_the_written_rule(keys, ratio, kernel, shared):
    (h, w), (rows, columns) = keys, [side * r for side, r in zip(keys, ratio, strict=True)]
    q = torch.randn(2 * shared, rows, columns, 3, dtype=torch.float64)
    k, v = torch.randn(2, 2, h, w, 3, dtype=torch.float64).unbind(0)
    scores = local_scores(q, k, kernel)
    weights = torch.randn(scores.shape, dtype=torch.float64)
    out = local_values(weights, v, kernel)
    for b, y, x in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).reshape(-1, 3).tolist():
        total = torch.zeros(3, dtype=torch.float64)
        for t, (i, j) in enumerate(neighbours((y, x), ratio, kernel)):
            if not (0 <= i < h and 0 <= j < w):
                assert scores[b, y, x, t] == OUTSIDE
                continue
            torch.testing.assert_close(scores[b, y, x, t], q[b, y, x] @ k[b // shared, i, j])
            total += weights[b, y, x, t] * v[b // shared, i, j]
        torch.testing.assert_close(out[b, y, x], total)


def test_local_attention_gradients():
    q = torch.randn(2, 4, 6, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_values(local_scores(q, k, (3, 2)).softmax(3), v, (3, 2))

    assert torch.autograd.gradcheck(attention, (q, k, v))


def test_local_attention_refuses():
    with pytest.raises(ValueError, match=r"kernel must be positive, and odd where causal, got \(2, 3\)"):
        window_places((2, 3), causal=True)
    with pytest.raises(ValueError, match="has 9 entries, got 8"):
        local_values(torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 1), (3, 3))


# ---- visibility


def test_prefix_mask_by_hand():
    """Two pads, one word, two coarse cells."""
    seen = prefix_mask(torch.tensor([[False, False, True]]), 2)[0]
    assert seen.int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1],
    ]


def fine_hidden(model: SuperResolutionTransformer, texts: list[list[int]], tokens: Tensor) -> Tensor:
    direct = model.config.kind == "direct"
    make, run = (direct_inputs, direct_hidden) if direct else (iterative_inputs, iterative_hidden)
    return run(model, make(model.config, texts, tokens))[:, -model.config.fine_len :]


@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_a_row_does_not_depend_on_its_batch(kind: str):
    """Texts of other lengths, none at all included."""
    config = tiny(kind)
    model, tokens = wild(config), cells(config, 3, fine=kind == "iterative")
    texts = [[30, 31, 32], [], [33]]
    together = fine_hidden(model, texts, tokens)
    for row, text in enumerate(texts):
        alone = fine_hidden(model, [text], tokens[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-10, rtol=1e-10)


def changed(model: SuperResolutionTransformer, tokens: Tensor, cell: int) -> set[tuple[int, int]]:
    """Fine cells that change with one token."""
    other = tokens.clone()
    other[0, cell] = (other[0, cell] + 1) % model.config.num_image_tokens
    before, after = (fine_hidden(model, [[30]], x) for x in (tokens, other))
    differs = (before != after).any(2).view(model.config.fine_grid)
    return {(y, x) for y, x in differs.nonzero().tolist()}


def test_direct_cells_see_the_coarse_cells_near_them():
    """One layer: the first is what a coarse token reaches before coarse cells have mixed."""
    config = tiny(num_layers=1, coarse_grid=(3, 3), fine_grid=(9, 9), num_positions=40)
    reached = changed(wild(config), cells(config, 1, fine=False), 0)
    assert reached == {(y, x) for y in range(6) for x in range(6)}


def test_iterative_cells_see_the_fine_cells_near_them():
    config = tiny("iterative", num_layers=1, fine_grid=(9, 9))
    reached = changed(wild(config), cells(config, 1, fine=True), 4 * 9 + 4)
    assert reached == {(y, x) for y in range(2, 7) for x in range(3, 6)}


# ---- procedures


class Characters:
    def encode(self, text: str) -> list[int]:
        return [26 + ord(character) % 14 for character in text]

    def id_of(self, piece: str) -> int:
        return 25


SAMPLING = SamplingConfig(prompts=PromptTemplates())


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def enlarged(prompts: list[str], seeds: list[int], max_batch: int = 3) -> Tensor:
    config = tiny(max_batch=max_batch)
    sampler = build_direct_sampler(config, torch.arange(config.num_image_tokens) % 7)
    frames = torch.stack([cells(config, 2, fine=False) + seed for seed in seeds]) % config.num_image_tokens
    return enlarge_videos(wild(config), Characters(), prompts, SAMPLING, sampler, generators(*seeds), frames)


def test_videos_do_not_depend_on_their_batch():
    both = enlarged(["ab", "c"], [5, 6])
    assert both.shape == (2, 2, 36) and both.dtype == torch.long
    assert int(both.min()) >= 0 and int(both.max()) < tiny().num_image_tokens
    assert torch.equal(enlarged(["c"], [6]), both[1:])
    assert torch.equal(enlarged(["ab", "c"], [5, 6], max_batch=1), both)
    assert not torch.equal(enlarged(["c"], [7]), both[1:])


def test_every_row_of_a_large_batch_is_refined():
    """The released code returns 4 of 5 rows; here a batch has no rest."""
    config = tiny("iterative")
    model, before = wild(config), cells(config, 5, fine=True)
    samplers = build_pass_samplers(config)
    uniforms = torch.rand(5, len(samplers), config.fine_len, 2, dtype=torch.float64)
    after = refine_frames(model, [[30]] * 5, before, samplers, uniforms)
    assert after.shape == before.shape
    assert bool((after != before).any(1).all())
    videos = before.view(1, 5, -1)
    texts = [[26 + ord("a") % 14]]
    by_stage = refine_videos(model, Characters(), ["a"], SAMPLING, samplers, generators(3), videos)
    uniforms = torch.rand(
        5, len(samplers), config.fine_len, 2, generator=generators(3)[0], dtype=torch.float64
    )
    assert torch.equal(by_stage[0], refine_frames(model, texts * 5, before, samplers, uniforms))


def test_nothing_to_refine():
    config = tiny("iterative")
    before, nothing = cells(config, 1, fine=True), torch.zeros(config.fine_len, dtype=torch.bool)
    samplers = build_pass_samplers(config)
    uniforms = torch.rand(1, len(samplers), config.fine_len, 2, dtype=torch.float64)
    after = refine_frames(wild(config), [[30]], before, samplers, uniforms, cells_S=nothing)
    assert torch.equal(after, before)


def test_top_k_keeps_ties():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    probabilities = TopKSampler(2).probabilities(logits)[0]
    weights = torch.tensor([0.0, 3.0, 2.0, 2.0, 0.0]).double().exp() * torch.tensor([0, 1, 1, 1, 0])
    torch.testing.assert_close(probabilities, weights / weights.sum())
    uniforms = torch.rand(4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = TopKSampler(2).sample(logits.expand(4000, -1), uniforms).bincount(minlength=5) / 4000
    torch.testing.assert_close(drawn.double(), probabilities, atol=0.03, rtol=0)


def test_half_precision_runs_and_logits_are_float32():
    for kind in ("direct", "iterative"):
        config = tiny(kind)
        model = SuperResolutionTransformer(config).to(torch.bfloat16).eval()
        tokens = cells(config, 1, fine=kind == "iterative")
        with torch.inference_mode():
            logits = model.image_logits(fine_hidden(model, [[30, 31]], tokens))
        assert logits.dtype == torch.float32 and bool(logits.isfinite().all())


def test_training_reaches_every_parameter():
    for kind in ("direct", "iterative"):
        config = tiny(kind, hidden_dropout=0.1, attention_dropout=0.1)
        model = SuperResolutionTransformer(config)
        hidden = fine_hidden(model, [[30, 31]], cells(config, 1, fine=kind == "iterative"))
        model.image_logits(hidden).logsumexp(2).sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# ---- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "magic"}, "unknown kind of super-resolution 'magic'"),
        ({"fine_grid": (7, 6)}, r"fine_grid \(7, 6\) must be a multiple of coarse_grid \(2, 3\)"),
        ({"num_positions": 14}, "num_positions must be >= 15, got 14"),
        ({"start_of_image": 3}, "start_of_image must lie in 23..39, got 3"),
        ({"pass_top_k": (5, 0)}, r"pass_top_k must be >= 1, got \(5, 0\)"),
        ({"max_batch": 0}, "max_batch must be >= 1, got 0"),
    ],
)
def test_illegal_settings(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        replace(tiny(), **changes)


def test_settings_survive_json():
    config = tiny("iterative")
    assert from_plain(SuperResolutionConfig, to_plain(config)) == config


def test_texts_and_tokens_that_do_not_fit():
    config = tiny()
    with pytest.raises(SettingError, match="the prompt has 5 tokens, super-resolution takes at most 4"):
        direct_inputs(config, [[1] * 5], cells(config, 1, fine=False))
    with pytest.raises(ValueError, match=r"expected coarse tokens \[1, 6\], got \[2, 6\]"):
        direct_inputs(config, [[1]], cells(config, 2, fine=False))
    config = tiny("iterative")
    inputs = iterative_inputs(config, [[30, 31, 32, 33, 34, 35]], cells(config, 1, fine=True))
    assert inputs.tokens[0, :5].tolist() == [30, 31, 32, 33, 34]
    with pytest.raises(ValueError, match=r"expected fine tokens \[1, 36\], got \[1, 35\]"):
        iterative_inputs(config, [[1]], torch.zeros(1, 35, dtype=torch.long))


def test_enlarging_needs_no_clusters():
    config = tiny()
    uniforms = torch.rand(1, config.fine_len, 2, dtype=torch.float64)
    tokens = enlarge_frames(
        wild(config), [[30]], cells(config, 1, fine=False), build_direct_sampler(config, None), uniforms
    )
    assert tokens.shape == (1, config.fine_len)
