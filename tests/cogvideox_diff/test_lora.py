"""Adapters in live layers and in files, against recorded SAT outputs and diffusers."""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvideox_diff import lora, lora_command
from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER, merge_sat_adapters, sat_transformer_table
from cogvideox_diff.config import PRESETS, SAT_FINAL_NORM_EPS, TransformerConfig
from cogvideox_diff.lora import (
    LoRALinear,
    adapter_names,
    base_weights,
    fuse,
    inject,
    linear_layers,
    load_lora,
    lora_parameters,
    merge,
    remove,
    save_lora,
    set_scale,
    unmerge,
)
from cogvideox_diff.lora_files import LORA_FILE, Adapter, Pair, read_adapter, write_adapter
from cogvideox_diff.transformer import ExpertTransformer
from shared.checkpoints import convert, invert, load_into, load_metadata, load_tensors
from shared.errors import OutputPathError, SettingError, WeightsError
from tests.parity.cogvideox.tiny_sat import Case, case_names, from_diffusers, read_case, relative_error

RANK, ALPHA = 3, 6.0
ATTENTION = ["attn.k", "attn.out", "attn.q", "attn.v"]


def tiny_model(seed: int = 0, **changes: Any) -> ExpertTransformer:
    settings: dict[str, Any] = {
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "position": "rope",
        "sample_size": (3, 4, 6),
        "time_embed_dim": 24,
        "text_dim": 20,
        "text_len": 5,
    }
    model = ExpertTransformer(TransformerConfig(**settings | changes)).eval()
    model.init_weights(torch.Generator().manual_seed(seed), zero_modulation=False)
    return model


def run(model: ExpertTransformer, seed: int = 7) -> Tensor:
    config, rng = model.config, torch.Generator().manual_seed(seed)
    latents = torch.randn(2, config.sample_size[0], config.in_channels, 4, 6, generator=rng)
    text = torch.randn(2, config.text_len, config.text_dim, generator=rng)
    dtype = model.text_proj.weight.dtype
    with torch.no_grad():
        return model(latents.to(dtype), text.to(dtype), torch.tensor([900, 20]))


def randomise(model: ExpertTransformer, seed: int = 1, name: str | None = None) -> None:
    """As if trained: B no longer zero."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model, name):
        parameter.data.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)


def adapted_model(**options: Any) -> ExpertTransformer:
    model = tiny_model()
    inject(model, RANK, ALPHA, **options)
    randomise(model)
    return model


# ---- layers


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


# ---- files


@pytest.mark.parametrize("targets", [lora.TARGETS, ("attn.out", "mlp.fc2", "text_proj", "time_embed.fc1")])
@pytest.mark.parametrize("as_file", [True, False])
def test_saved_and_loaded_is_the_same(tmp_path: Path, targets: tuple[str, ...], as_file: bool) -> None:
    model = adapted_model(targets=targets)
    file = save_lora(model, tmp_path / "a.safetensors" if as_file else tmp_path, notes={"trigger": "wug"})
    assert file.name == ("a.safetensors" if as_file else LORA_FILE)
    other = tiny_model()
    report = load_lora(other, file if as_file else tmp_path)
    assert (report.matched, report.unmatched) == (len(lora_parameters(model)) // 2, ())
    assert (report.ranks, report.alphas, report.alpha_source) == ([RANK], [ALPHA], "the file's metadata")
    assert torch.equal(run(other), run(model))
    assert read_adapter(file).notes == {"trigger": "wug"}


def test_names_and_metadata_of_a_file(tmp_path: Path) -> None:
    file = save_lora(adapted_model(), tmp_path)
    wanted = {
        f"transformer.transformer_blocks.{n}.attn1.{part}.lora_{side}.weight"
        for n in range(2)
        for part in ("to_q", "to_k", "to_v", "to_out.0")
        for side in "AB"
    }
    assert load_file(file).keys() == wanted
    metadata = load_metadata(file)
    own, peft = json.loads(metadata["cogvideo_lab"]), json.loads(metadata["lora_adapter_metadata"])
    assert (own["rank"], own["alpha"], own["targets"]) == ([RANK], [ALPHA], ATTENTION)
    assert own["base"]["width"] == 32 and own["base"]["layers"] == 2
    assert (peft["transformer.r"], peft["transformer.lora_alpha"]) == (RANK, ALPHA)


def test_layers_that_are_one_matrix_in_a_file(tmp_path: Path) -> None:
    """diffusers has one linear for the modulation of both parts; its adapter is read into both and written
    back as it was. Two independent adapters become one of twice the rank."""
    name = "transformer.transformer_blocks.1.norm1.linear"
    pair = {f"{name}.lora_A.weight": torch.randn(2, 24), f"{name}.lora_B.weight": torch.randn(192, 2)}
    save_file(pair, tmp_path / "a.safetensors")
    model = tiny_model()
    assert load_lora(model, tmp_path / "a.safetensors").matched == 2
    back = load_file(save_lora(model, tmp_path / "b.safetensors"))
    assert back.keys() == pair.keys() and all(torch.equal(back[key], pair[key]) for key in pair)

    two = adapted_model(targets=("norm1.video", "norm1.text"))
    file = save_lora(two, tmp_path / "c.safetensors")
    again = tiny_model()
    assert load_lora(again, file).ranks == [2 * RANK]
    assert relative_error(run(again), run(two)) < 1e-5


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("transformer."),
        lambda name: "base_model.model." + name.removeprefix("transformer."),
        lambda name: name.replace("lora_A.weight", "lora_A.default.weight").replace("B.w", "B.default.w"),
        lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    ],
)
def test_spellings_of_peft_names(tmp_path: Path, rename: Any) -> None:
    model = adapted_model()
    tensors = load_file(save_lora(model, tmp_path / "a"))
    save_file({rename(name): x for name, x in tensors.items()}, tmp_path / "b.safetensors")
    report = load_lora(tiny_model(), tmp_path / "b.safetensors")
    assert report.matched == 8 and not report.unmatched
    assert (report.alphas, report.alpha_source) == ([RANK], "not in the file, taken as the rank")
    other = tiny_model()
    load_lora(other, tmp_path / "b.safetensors", alpha=ALPHA)
    assert torch.equal(run(other), run(model))


def test_where_alpha_comes_from(tmp_path: Path) -> None:
    tensors = load_file(save_lora(adapted_model(), tmp_path / "a"))
    peft = tmp_path / "peft"
    peft.mkdir()
    save_file(tensors, peft / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": 12, "alpha_pattern": {"transformer_blocks.1.attn1.to_q": 5}}
    (peft / "adapter_config.json").write_text(json.dumps(settings))
    pairs = read_adapter(peft).pairs
    assert pairs["blocks.0.attn.q"].alpha == 12 and pairs["blocks.1.attn.q"].alpha == 5
    (peft / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": True}))
    assert (
        read_adapter(peft)
        .pairs["blocks.0.attn.k"]
        .delta()
        .allclose(12 / RANK**0.5 * pairs["blocks.0.attn.k"].up @ pairs["blocks.0.attn.k"].down)
    )
    alphas = {"transformer.transformer_blocks.0.attn1.to_v.alpha": torch.tensor(2.0)}
    save_file(tensors | alphas, tmp_path / "own.safetensors")
    own = read_adapter(tmp_path / "own.safetensors")
    assert own.pairs["blocks.0.attn.v"].alpha == 2 and own.alpha_source == "one value per module"
    mixed = read_adapter(write_adapter(own, tmp_path / "mixed.safetensors"))
    assert {name: pair.alpha for name, pair in mixed.pairs.items()} == {
        name: pair.alpha for name, pair in own.pairs.items()
    }


def test_folding_keeps_the_output(tmp_path: Path) -> None:
    model = adapted_model()
    adapter = read_adapter(save_lora(model, tmp_path))
    folded = write_adapter(adapter, tmp_path / "f.safetensors", fold=True)
    save_file(load_file(folded), tmp_path / "bare.safetensors")  # a reader without metadata
    other = tiny_model()
    load_lora(other, tmp_path / "bare.safetensors")
    assert relative_error(run(other), run(model)) < 1e-5


def test_sat_naming_and_back(tmp_path: Path) -> None:
    model = adapted_model()
    file = save_lora(model, tmp_path, naming="sat")
    assert (tmp_path / "latest").read_text() == "1" and file.suffix == ".pt"
    name = "model.diffusion_model.transformer.layers.1.attention.query_key_value.matrix_B.2"
    assert load_tensors(tmp_path)[name].shape == (32, RANK)
    other = tiny_model()
    report = load_lora(other, tmp_path)
    assert (report.naming, report.alphas, report.matched) == ("sat", [1.0], 8)
    assert relative_error(run(other), run(model)) < 1e-5
    with pytest.raises(WeightsError, match="missing"):  # SAT adapts q, k and v together
        save_lora(adapted_model(targets=("attn.q",)), tmp_path / "q", naming="sat")


# ---- errors of files


def saved(tmp_path: Path, change: Any = None) -> Path:
    """A saved adapter without metadata, changed."""
    tensors = load_file(save_lora(adapted_model(), tmp_path / "saved"))
    if change is not None:
        change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


A0 = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"


def test_halves_that_do_not_fit(tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[A0] = tensors[A0][:1].clone()

    with pytest.raises(WeightsError, match=r"1 of 8 adapted matrices are broken: .*to_q has A \[1, 32\]"):
        load_lora(tiny_model(), saved(tmp_path, cut))
    with pytest.raises(WeightsError, match=r"1 of 8 .* has 0 A and 1 B"):
        load_lora(tiny_model(), saved(tmp_path, lambda tensors: tensors.pop(A0)))


def test_another_base(tmp_path: Path) -> None:
    file = save_lora(adapted_model(), tmp_path)
    for changes, words in (
        ({"num_layers": 3}, "layers 2, here 3"),
        ({"in_channels": 8}, "patch_kernel"),
        ({"num_heads": 3}, "width 32, here 48.*8 layers matched, 0 unmatched"),
    ):
        other = tiny_model(**changes)
        with pytest.raises(WeightsError, match=f"made for another model.*{words}"):
            load_lora(other, file)
        assert not adapter_names(other) and all(p.requires_grad for p in other.parameters())
    assert load_lora(tiny_model(in_channels=8), file, any_base=True).matched == 8
    with pytest.raises(WeightsError, match=r"8 layers matched, 0 unmatched, 8 of another size"):
        load_lora(tiny_model(num_heads=3), file, any_base=True)
    with pytest.raises(WeightsError, match="8 of another size"):
        load_lora(tiny_model(num_heads=3), saved(tmp_path))


def test_nothing_matches(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("attn1", "attention")] = tensors.pop(name)

    with pytest.raises(WeightsError, match="0 layers matched, 8 unmatched"):
        load_lora(tiny_model(), saved(tmp_path, rename))
    save_file(tiny_model().state_dict(), tmp_path / "full.safetensors")
    with pytest.raises(WeightsError, match="holds no LoRA pairs: 0 of"):
        load_lora(tiny_model(), tmp_path / "full.safetensors")


def test_a_part_matches(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        for side in "AB":
            tensors[f"text_encoder.layer.q.lora_{side}.weight"] = torch.zeros(2, 2)
            tensors[f"transformer.transformer_blocks.7.attn1.to_q.lora_{side}.weight"] = torch.zeros(
                (RANK, 32) if side == "A" else (32, RANK)
            )

    file, model = saved(tmp_path, add), tiny_model()
    with pytest.warns(UserWarning, match="8 matched, 2 unmatched"):
        report = load_lora(model, file)
    assert report.matched == 8
    assert set(report.unmatched) == {"blocks.7.attn.q", "text_encoder.layer.q"}
    with pytest.raises(WeightsError, match="8 matched, 2 unmatched"):
        load_lora(tiny_model(), file, strict=True)


def test_other_kinds_of_adapters_are_refused(tmp_path: Path) -> None:
    def dora(tensors: dict[str, Tensor]) -> None:
        tensors[A0.replace("lora_A", "lora_magnitude_vector")] = torch.ones(32)

    with pytest.raises(WeightsError, match="not a plain LoRA"):
        load_lora(tiny_model(), saved(tmp_path, dora))


def test_an_adapter_of_several_must_be_named(tmp_path: Path) -> None:
    model = adapted_model(name="a")
    inject(model, RANK, ALPHA, name="b")
    with pytest.raises(SettingError, match="2 adapters"):
        save_lora(model, tmp_path)
    assert save_lora(model, tmp_path, name="a").is_file()
    with pytest.raises(SettingError, match="0 adapters"):
        save_lora(tiny_model(), tmp_path)


# ---- recorded SAT files


def recorded() -> list[str]:
    return [name for name in case_names() if "lora" in read_case(name).meta]


def without_adapters(case: Case) -> ExpertTransformer:
    config = from_diffusers(case.meta["diffusers_config"], final_norm_eps=SAT_FINAL_NORM_EPS)
    base = merge_sat_adapters(load_tensors(case.folder / "transformer"), alpha=0.0)
    weights = convert(base, sat_transformer_table(config))
    return load_into(ExpertTransformer(config), weights, dtype=torch.float32).eval()


def recorded_error(model: ExpertTransformer, case: Case) -> float:
    given, latents = case.inputs(), case.io["forward.latents"]
    if given["image_latents"] is not None:
        latents = torch.cat([latents, given["image_latents"]], dim=2)
    with torch.no_grad():
        got = model(latents, given["text"], case.io["forward.timesteps"], given["ofs"])
    return relative_error(got, case.io["forward.output"])


@pytest.mark.parity
def test_there_are_recorded_adapters() -> None:
    assert recorded()


@pytest.mark.parity
@pytest.mark.parametrize("name", recorded())
def test_recorded_sat_adapter_in_live_layers(name: str, tmp_path: Path) -> None:
    case = read_case(name)
    model = without_adapters(case)
    assert recorded_error(model, case) > 1e-3  # the adapter matters
    report = load_lora(model, case.folder / "transformer")
    assert (report.naming, report.ranks) == ("sat", [case.meta["lora"]["rank"]])
    assert report.alphas == [case.meta["lora"]["alpha"]]
    assert (report.matched, report.unmatched) == (4 * model.config.num_layers, ())
    live = recorded_error(model, case)
    merge(model)
    merged = recorded_error(model, case)
    unmerge(model)
    print(f"{name}: live {live:.1e}, merged {merged:.1e}")
    assert max(live, merged) < 1e-5

    for to in ("diffusers", "sat"):
        said = lora_command.convert_adapter(case.folder / "transformer", tmp_path / to, to=to)
        assert said["matched"] == report.matched
        again = without_adapters(case)
        load_lora(again, tmp_path / to)
        assert recorded_error(again, case) < 1e-3  # the file's half precision, rounded once more by folding


@pytest.mark.parity
@pytest.mark.parametrize("name", recorded())
def test_recorded_sat_file_merges(name: str, tmp_path: Path) -> None:
    case = read_case(name)
    folder = case.folder / "transformer"
    said = lora_command.merge_files(folder, tmp_path / "merged")
    config = from_diffusers(case.meta["diffusers_config"], final_norm_eps=SAT_FINAL_NORM_EPS)
    weights = convert(load_tensors(tmp_path / "merged"), sat_transformer_table(config))
    model = load_into(ExpertTransformer(config), weights, dtype=torch.float32).eval()
    assert said["matched"] == 4 * config.num_layers
    assert recorded_error(model, case) < 5e-3  # merged weights are rounded to the file's dtype
    with pytest.raises(WeightsError, match="merge those first"):
        lora_command.merge_files(folder, tmp_path / "again", base=folder)


# ---- the verb


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    lora_command.add_arguments(parser)
    return parser.parse_args(arguments)


def preset_adapter(preset: str, rank: int = 1) -> Adapter:
    """Adapters of the right shapes for a full-size model."""
    with torch.device("meta"):
        layers = linear_layers(ExpertTransformer(PRESETS[preset]().transformer))
    pairs = {
        path: Pair(
            down=torch.zeros(rank, layer.in_features), up=torch.zeros(layer.out_features, rank), alpha=1.0
        )
        for path, layer in layers.items()
        if path.endswith(("attn.q", "attn.out"))
    }
    return Adapter(pairs=pairs)


def test_inspect_says_what_a_file_is(tmp_path: Path) -> None:
    file = write_adapter(preset_adapter("cogvideox-2b"), tmp_path / "a.safetensors")
    said = lora_command.run(options("inspect", str(file)))
    assert said["fits"] == {"cogvideox-2b": 60}
    assert (said["rank"], said["targets"], said["pairs"]) == ([1], ["attn.out", "attn.q"], 60)
    said = lora_command.run(options("inspect", str(file), "--preset", "cogvideox-2b"))
    assert (said["matched"], said["unmatched"]) == (60, [])
    assert "matched: 60" in lora_command.lines_of(said)
    assert "fits: none" in lora_command.lines_of(said | {"fits": {}})
    with pytest.raises(WeightsError, match="60 layers matched, 0 unmatched, 60 of another size"):
        lora_command.run(options("inspect", str(file), "--preset", "cogvideox-5b"))


@pytest.mark.parametrize("naming", ["own", "joint", "diffusers", "sat"])
def test_merge_into_every_naming(tmp_path: Path, naming: str) -> None:
    model = adapted_model()
    save_lora(model, tmp_path / "lora")
    tables = {"diffusers": DIFFUSERS_TRANSFORMER, "sat": sat_transformer_table(model.config)}
    weights = tiny_model().state_dict()
    if naming in tables:
        weights = invert(weights, tables[naming])
    elif naming == "joint":
        weights = {f"transformer.{k}": v for k, v in weights.items()} | {"text_encoder.x": torch.ones(1)}
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "base.safetensors")
    arguments = ("merge", str(tmp_path / "lora"), "--model_path", str(tmp_path / "base.safetensors"))
    arguments += ("--output_path", str(tmp_path / "merged.safetensors"), "--lora_scale", "0.5")
    said = lora_command.run(options(*arguments))
    assert (said["matched"], said["scale"]) == (8, 0.5)
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == weights.keys()
    if naming in tables:
        merged = convert(merged, tables[naming])
    elif naming == "joint":
        merged = {k.removeprefix("transformer."): v for k, v in merged.items() if k != "text_encoder.x"}
    set_scale(model, 0.5)
    assert relative_error(run(load_into(tiny_model(seed=3), merged)), run(model)) < 1e-5
    with pytest.raises(OutputPathError, match="already exists"):
        lora_command.run(options(*arguments))


def test_merge_into_a_diffusers_folder(tmp_path: Path) -> None:
    save_lora(adapted_model(), tmp_path / "lora")
    base = tmp_path / "base"
    base.mkdir()
    weights = invert(tiny_model().state_dict(), DIFFUSERS_TRANSFORMER)
    save_file({k: v.contiguous() for k, v in weights.items()}, base / lora_command.WEIGHTS_FILE)
    (base / "config.json").write_text("{}")
    said = lora_command.merge_files(tmp_path / "lora", tmp_path / "out", base=base)
    assert Path(said["output"]) == tmp_path / "out" / lora_command.WEIGHTS_FILE
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_merge_refuses(tmp_path: Path) -> None:
    file = save_lora(adapted_model(), tmp_path / "lora")
    save_file(tiny_model(num_heads=3).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(WeightsError, match="width 32, here 48"):
        lora_command.merge_files(file, tmp_path / "m", base=tmp_path / "wide.safetensors")
    with pytest.raises(SettingError, match="without its base"):
        lora_command.merge_files(file, tmp_path / "m")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="no CogVideoX transformer"):
        lora_command.merge_files(file, tmp_path / "m", base=tmp_path / "other.safetensors")
    assert not (tmp_path / "m").exists()


def test_missing_flags() -> None:
    with pytest.raises(SettingError, match="--output_path"):
        lora_command.run(options("convert", "x", "--to", "sat"))
    with pytest.raises(SettingError, match="--to"):
        lora_command.run(options("convert", "x", "--output_path", "y"))


# ---- diffusers live

PEER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 24,
    "ofs_embed_dim": None,
    "text_embed_dim": 20,
    "num_layers": 2,
    "sample_height": 4,
    "sample_width": 6,
    "sample_frames": 9,
    "patch_size": 2,
    "patch_size_t": None,
    "max_text_seq_length": 5,
    "spatial_interpolation_scale": 1.875,
    "use_rotary_positional_embeddings": False,
    "use_learned_positional_embeddings": False,
}


def peer_and_ours() -> tuple[Any, ExpertTransformer]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    peer = diffusers.CogVideoXTransformer3DModel(**PEER).eval()
    model = ExpertTransformer(from_diffusers(PEER, final_norm_eps=1e-5)).eval()
    return peer, load_into(model, convert(peer.state_dict(), DIFFUSERS_TRANSFORMER))


def outputs(peer: Any, model: ExpertTransformer) -> tuple[Tensor, Tensor]:
    latents, text, steps = torch.randn(2, 3, 4, 4, 6), torch.randn(2, 5, 20), torch.tensor([999, 17])
    with torch.no_grad():
        return peer(latents, text, steps, return_dict=False)[0], model(latents, text, steps)


@pytest.mark.peers
@pytest.mark.parametrize("targets", [lora.TARGETS, ("attn.v", "mlp.fc1", "norm1.video", "norm1.text")])
def test_diffusers_pipeline_loads_ours(tmp_path: Path, targets: tuple[str, ...]) -> None:
    pytest.importorskip("peft")
    import diffusers

    peer, model = peer_and_ours()
    inject(model, RANK, ALPHA, targets)
    randomise(model)
    pipe = diffusers.CogVideoXPipeline(None, None, None, peer, diffusers.CogVideoXDDIMScheduler())
    plain, ours = outputs(peer, model)
    assert relative_error(plain, ours) > 1e-2
    pipe.load_lora_weights(str(save_lora(model, tmp_path).parent))
    wanted, ours = outputs(peer, model)
    error = relative_error(ours, wanted)
    print(f"{error:.1e}")
    assert error <= 1e-4


@pytest.mark.peers
def test_diffusers_saves_what_we_load(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import diffusers

    peer, model = peer_and_ours()
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=5, target_modules=["to_q", "to_out.0"], init_lora_weights=False
    )
    peer.add_adapter(settings)
    layers = peft.get_peft_model_state_dict(peer)
    told = {"r": RANK, "lora_alpha": 5, "target_modules": ["to_q", "to_out.0"]}
    diffusers.CogVideoXPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=told
    )
    report = load_lora(model, tmp_path)
    assert (report.matched, report.alphas) == (4, [5])
    wanted, ours = outputs(peer, model)
    error = relative_error(ours, wanted)
    print(f"{error:.1e}")
    assert error <= 1e-4


@pytest.mark.peers
def test_diffusers_with_merged_weights_agrees(tmp_path: Path) -> None:
    """The same without PEFT: a diffusers folder merged by us."""
    peer, model = peer_and_ours()
    base = copy.deepcopy(peer)
    base.save_pretrained(tmp_path / "base")
    inject(model, RANK, ALPHA)
    randomise(model)
    file = save_lora(model, tmp_path / "lora")
    lora_command.merge_files(file, tmp_path / "merged", base=tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = type(peer).from_pretrained(tmp_path / "merged").eval()
    wanted, ours = outputs(merged, model)
    assert relative_error(ours, wanted) <= 1e-4
