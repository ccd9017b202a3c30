"""Local attention against upstream's CUDA kernels, compiled as C++."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo_ar.attention import excluded
from cogvideo_ar.super_resolution.local_attention import OUTSIDE, local_scores, local_values
from cogvideo_ar.super_resolution.transformer import DirectContext, IterativeContext
from tests.parity.cogview2_sr.models import folder
from tests.parity.recorded import read_json, read_tensors

pytestmark = pytest.mark.parity
FACTS: dict[str, Any] = read_json(folder() / "local_attention_cases.json")
CASES: dict[str, Any] = {case["name"]: case for case in FACTS["cases"]}


@cache
def tensors() -> dict[str, Tensor]:
    return read_tensors(folder() / "local_attention_cases.safetensors")


def last(x_BCHW: Tensor) -> Tensor:
    """Upstream's channels-first layout -> [B, H, W, C]."""
    return x_BCHW.permute(0, 2, 3, 1)


def kernel_of(name: str) -> tuple[int, int]:
    """The kernel that a case's name ends with."""
    rows, columns = name.rsplit("_", 1)[1].split("x")
    return int(rows), int(columns)


def first(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name: str) -> None:
    facts = CASES[name]
    kernel, causal = tuple(facts["kernel"]), facts["causal"]
    recorded = {key.removeprefix(f"{name}."): x for key, x in tensors().items() if key.startswith(f"{name}.")}
    q, k, v = (recorded[key].clone().requires_grad_() for key in "qkv")
    scores = local_scores(last(q), last(k), kernel, causal=causal)
    assert scores.shape[3] == facts["window"]
    assert int((scores == OUTSIDE).sum()) == facts["out_of_image_entries"]
    out = first(local_values(scores.softmax(3), last(v), kernel, causal=causal))
    (out * recorded["grad_out"]).sum().backward()
    torch.testing.assert_close(scores, recorded["scores"], atol=1e-5, rtol=1e-6)
    got = {"out": out, "grad_q": q.grad, "grad_k": k.grad, "grad_v": v.grad}
    for key, x in got.items():
        torch.testing.assert_close(x, recorded[key], atol=1e-6, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_half_precision() -> None:
    """Scores and values in fp16: products and sums are rounded where upstream rounds them."""
    recorded = {key.split(".")[1]: x for key, x in tensors().items() if key.startswith("half_")}
    (name,) = {key.split(".")[0] for key in tensors() if key.startswith("half_")}
    kernel = kernel_of(name)
    scores = local_scores(last(recorded["q"]), last(recorded["k"]), kernel)
    assert scores.dtype == torch.float16
    torch.testing.assert_close(scores, recorded["scores"], atol=0, rtol=1e-3)  # one unit in the last place
    out = first(local_values(recorded["probs"], last(recorded["v"]), kernel))
    assert torch.equal(out, recorded["out"])


def test_values_outside_count_for_nothing() -> None:
    (name,) = {key.split(".")[0] for key in tensors() if key.startswith("raw_")}
    weights, v = tensors()[f"{name}.weights"], tensors()[f"{name}.v"]
    out = first(local_values(weights, last(v), kernel_of(name)))
    torch.testing.assert_close(out, tensors()[f"{name}.out"])


def single(values: Any) -> Tensor:
    """Rows and columns -> one batch, one channel [1, H, W, 1]."""
    return torch.tensor(values)[None, :, :, None]


def test_by_hand() -> None:
    hand = FACTS["hand"]
    q, k = single(hand["q"]), single(hand["k"])
    kernel = tuple(hand["kernel"])
    assert local_scores(q, k, kernel)[0].tolist() == hand["scores"]
    assert local_scores(q, k, kernel, causal=True)[0].tolist() == hand["scores_causal"]
    assert local_scores(q, k, (2, 2))[0].tolist() == hand["scores_kernel_2x2"]
    ones = torch.ones(1, *k.shape[1:3], kernel[0] * kernel[1])
    assert local_values(ones, k, kernel)[0, :, :, 0].tolist() == hand["weights_all_one_out"]


def test_across_resolutions_by_hand() -> None:
    hand = FACTS["hand_cross"]
    scores = local_scores(torch.ones(1, *hand["query_hw"], 1), single(hand["k"]), tuple(hand["kernel"]))
    for key, expected in hand.items():
        if key.startswith("scores_row"):
            row, column = (int(part[3:]) for part in key.replace("col", "row").split("_")[1:])
            assert scores[0, row, column].tolist() == expected


@pytest.mark.parametrize("case", FACTS["rejects"])
def test_rejected(case: str) -> None:
    assert not FACTS["rejects"][case]["ok"]
    sizes = {
        "causal_even_kernel": ((1, 4, 4, 2), (1, 4, 4, 2), (2, 3), True),
        "query_size_not_multiple": ((1, 5, 4, 2), (1, 4, 4, 2), (3, 3), False),
        "batch_not_multiple": ((3, 4, 4, 2), (2, 4, 4, 2), (3, 3), False),
    }
    q, k, kernel, causal = sizes[case]
    with pytest.raises(ValueError, match=r"no multiple of keys|odd where causal"):
        local_scores(torch.zeros(q), torch.zeros(k), kernel, causal=causal)


# ---- whole attention functions: projections in, context out


def heads(x_BLC: Tensor, num_heads: int) -> Tensor:
    return x_BLC.unflatten(2, (num_heads, -1)).transpose(1, 2)


def merged(x_BNLD: Tensor) -> Tensor:
    return x_BNLD.transpose(1, 2).flatten(2)


def softly(mask: Tensor, weights: Tensor) -> Tensor:
    """Upstream's mask of ones and zeros as a bias."""
    return weights.masked_fill(mask == 0, excluded(weights.dtype))[None, None]


@pytest.mark.parametrize("plain", [False, True])
def test_direct_attention(plain: bool) -> None:
    facts, recorded = FACTS["dsr_attention"], tensors()
    x = {key: heads(recorded[f"dsr_attention.{key}"], facts["heads"]) for key in ("q0", "k0", "v0")}
    x |= {key: heads(recorded[f"dsr_attention.{key}"], facts["heads"]) for key in ("q1", "k1", "v1")}
    weights = recorded["dsr_attention.log_weights"]
    side, side2 = facts["kernel_size"], facts["kernel_size2"]
    context = DirectContext(
        coarse_grid=(facts["low_edge"],) * 2,
        fine_grid=(facts["high_edge"],) * 2,
        coarse_kernel=(side2, side2),
        fine_kernel=(2 * side - 1, side),
        prefix_bias=softly(recorded["dsr_attention.mask"], weights * (not plain)),
        coarse_weight=0.0 if plain else facts["add_scalar"],
    )
    ending = "_plain" if plain else ""
    prefix = merged(context.prefix(x["q0"], x["k0"], x["v0"]))
    fine = merged(context.fine(x["q1"], x["k1"], x["v1"], x["k0"], x["v0"]))
    torch.testing.assert_close(prefix, recorded[f"dsr_attention.ctx0{ending}"], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(fine, recorded[f"dsr_attention.ctx1{ending}"], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("plain", [False, True])
def test_iterative_attention(plain: bool) -> None:
    facts, recorded = FACTS["itersr_attention"], tensors()
    x = {key: heads(recorded[f"itersr_attention.{key}"], facts["heads"]) for key in ("q0", "k0", "v0")}
    x |= {key: heads(recorded[f"dsr_attention.{key}"], facts["heads"]) for key in ("q1", "k1", "v1")}
    mask, weights = recorded["itersr_attention.mask"], recorded["itersr_attention.log_weights"]
    context = IterativeContext(
        fine_grid=(facts["edge"],) * 2,
        fine_kernel=(2 * facts["kernel_size"] - 1, facts["kernel_size"]),
        padding=softly(mask, weights * 0),
        text_bias=softly(mask, weights * (not plain)),
    )
    out = torch.cat(
        [
            merged(context.prefix(x["q0"], x["k0"], x["v0"])),
            merged(context.fine(x["q1"], x["k1"], x["v1"], x["k0"], x["v0"])),
        ],
        dim=1,
    )
    expected = recorded["itersr_attention.out" + ("_plain" if plain else "")]
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
