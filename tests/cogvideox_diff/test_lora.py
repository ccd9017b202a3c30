"""Adapters in live layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogvideox_diff import lora
from cogvideox_diff.lora import (
    LoRALinear,
    adapter_names,
    base_weights,
    fuse,
    inject,
    linear_layers,
    lora_parameters,
    merge,
    remove,
    set_scale,
    unmerge,
)
from cogvideox_diff.lora_files import Pair
from cogvideox_diff.transformer import ExpertTransformer
from shared.checkpoints import load_into
from shared.errors import SettingError
from tests.cogvideox_diff.tiny_lora import ALPHA, RANK, adapted_model, randomise, run, tiny_model
from tests.parity.cogvideox.tiny_sat import relative_error


def test_a_new_adapter_changes_nothing_and_a_trained_one_does() -> None:
    model = tiny_model()
    before = run(model)
    names = inject(model, RANK, ALPHA)
    assert len(names) == 4 * model.config.num_layers
    assert torch.equal(run(model), before)
    randomise(model)
    assert relative_error(run(model), before) > 0.01


def test_the_formula() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(5, 7))
    pair = Pair(down=torch.randn(RANK, 5), up=torch.randn(7, RANK), alpha=ALPHA)
    x, weight, bias = torch.randn(4, 5), layer[0].weight.detach().clone(), layer[0].bias.detach()
    lora.attach(layer, {"0": pair})
    set_scale(layer, 0.5)
    wanted = x @ (weight + 0.5 * ALPHA / RANK * pair.up @ pair.down).T + bias
    torch.testing.assert_close(layer(x), wanted)


def test_only_adapters_get_gradients() -> None:
    model = adapted_model()
    latents, text = torch.randn(1, 3, 4, 4, 6), torch.randn(1, 5, 20)
    model(latents, text, torch.tensor([500])).square().mean().backward()
    trained = {id(p) for p in lora_parameters(model)}
    assert len(trained) == 2 * 4 * model.config.num_layers
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
        assert (parameter.grad is not None) == (id(parameter) in trained), name
    assert all(p.grad.abs().max() > 0 for p in lora_parameters(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_unmerged(dtype: torch.dtype) -> None:
    model = adapted_model().to(dtype)
    weights, live = {k: v.clone() for k, v in base_weights(model).items()}, run(model)
    merge(model)
    assert relative_error(run(model), live) < (1e-5 if dtype == torch.float32 else 3e-2)
    assert not torch.equal(base_weights(model)["blocks.0.attn.q.weight"], weights["blocks.0.attn.q.weight"])
    unmerge(model)
    assert torch.equal(run(model), live)  # exact in any dtype
    assert all(torch.equal(x, weights[name]) for name, x in base_weights(model).items())


def test_several_adapters_add_up() -> None:
    model = tiny_model()
    plain = run(model)
    for seed, name in enumerate(("style", "motion")):
        inject(model, RANK + seed, ALPHA, ("to_q", "mlp.fc1"), name=name)
        randomise(model, seed, name)
    assert adapter_names(model) == ["style", "motion"]
    both = run(model)
    set_scale(model, 0, "motion")
    style = run(model)
    set_scale(model, 0)
    assert torch.equal(run(model), plain)
    set_scale(model, 1)
    assert torch.equal(run(model), both)
    remove(model, "motion")
    assert torch.equal(run(model), style)
    assert relative_error(style, both) > 1e-3
    remove(model)
    assert torch.equal(run(model), plain)
    assert not any(isinstance(layer, LoRALinear) for layer in model.modules())
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


def test_a_merged_model_follows_its_adapters() -> None:
    model = adapted_model()
    set_scale(model, 0.25)
    live = run(model)
    set_scale(model, 1)
    merge(model)
    set_scale(model, 0.25)
    assert relative_error(run(model), live) < 1e-5
    remove(model)
    assert torch.equal(run(model), run(tiny_model()))


def test_fused_weights_load_into_a_plain_model() -> None:
    model = adapted_model()
    live = run(model)
    fuse(model)
    again = load_into(tiny_model(seed=5), model.state_dict())
    assert relative_error(run(again), live) < 1e-5


def test_all_targets_act() -> None:
    """Every layer that may be named changes the output: none is used around its adapter. (What the last
    block does to the text is read by nothing.)"""
    unread = {"blocks.1.norm2.text"}
    for target in sorted(linear_layers(tiny_model()).keys() - unread):
        model = tiny_model()
        plain = run(model)
        (name,) = inject_unsaved(model, target)
        assert name == target
        assert not torch.equal(run(model), plain), target


def inject_unsaved(model: ExpertTransformer, path: str) -> list[str]:
    outputs, inputs = linear_layers(model)[path].weight.shape
    pair = Pair(down=torch.randn(2, inputs), up=torch.randn(outputs, 2), alpha=2.0)
    lora.attach(model, {path: pair})
    return [path]


def test_the_patch_layer_is_no_target() -> None:
    """In 1.5 it is a linear layer, whose kernel the model uses without calling it."""
    model = tiny_model(patch_size=(2, 2, 2), sample_size=(4, 4, 6))
    with pytest.raises(SettingError, match=r"patch_embed\.proj.*legal targets"):
        inject(model, RANK, ALPHA, ("patch_embed.proj",))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": ("to_kk",)}, "nearest: 'to_k'"),
        ({"targets": ("norm1.video",)}, "cannot be saved"),
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"name": "a.b"}, "name"),
        ({"name": "pop"}, "name"),
    ],
)
def test_wrong_settings(change: dict[str, Any], words: str) -> None:
    model = tiny_model()
    with pytest.raises(SettingError, match=words):
        inject(model, **{"rank": RANK, "alpha": ALPHA} | change)
    assert not adapter_names(model)
    assert all(p.requires_grad for p in model.parameters())


def test_unknown_and_taken_names() -> None:
    model = adapted_model(name="style")
    for act in (set_scale, remove, lora_parameters):
        arguments = (0.5,) if act is set_scale else ()
        with pytest.raises(SettingError, match="nearest: 'style'"):
            act(model, *arguments, name="styl")
    with pytest.raises(SettingError, match="taken"):
        inject(model, RANK, ALPHA, name="style")
    with pytest.raises(SettingError, match="finite"):
        set_scale(model, float("nan"))
