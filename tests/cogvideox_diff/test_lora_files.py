"""Adapters in files: namings, metadata, errors, and the recorded files of SAT with their outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvideox_diff import lora
from cogvideox_diff.checkpoints import merge_sat_adapters, sat_transformer_table
from cogvideox_diff.commands import lora as lora_command
from cogvideox_diff.config import SAT_FINAL_NORM_EPS
from cogvideox_diff.lora import adapter_names, inject, load_lora, lora_parameters, merge, save_lora, unmerge
from cogvideox_diff.lora_files import LORA_FILE, read_adapter, write_adapter
from cogvideox_diff.transformer import ExpertTransformer
from shared.checkpoints import convert, load_into, load_metadata, load_tensors
from shared.errors import SettingError, WeightsError
from tests.cogvideox_diff.tiny_lora import ALPHA, RANK, adapted_model, run, tiny_model
from tests.parity.cogvideox.tiny_sat import Case, case_names, from_diffusers, read_case, relative_error

ATTENTION = ["attn.k", "attn.out", "attn.q", "attn.v"]


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
