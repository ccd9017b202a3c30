"""The table engine and the readers of weight files."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shared.checkpoints import (
    Drop,
    Merge,
    Rename,
    Split,
    Transform,
    convert,
    invert,
    load_into,
    load_metadata,
    load_tensors,
    reshape,
    sat_checkpoint_file,
    sat_checkpoint_files,
    save_tensors,
)
from shared.errors import OutputPathError, WeightsError
from tests.parity.recorded import case_folder


def swapped(x: torch.Tensor) -> torch.Tensor:
    """The second and the third quarter of eight rows change places."""
    return x[[0, 1, 4, 5, 2, 3, 6, 7]]


TABLE = (
    Rename("layers.{n}.dense.{p}", "blocks.{n}.out.{p}"),
    Split("layers.{n}.qkv.{p}", ("blocks.{n}.q.{p}", "blocks.{n}.k.{p}", "blocks.{n}.v.{p}")),
    Merge(("gate.{n}", "up.{n}"), "gate_up.{n}", dim=1),
    Split("norm.{n}", ("a.{n}", "b.{n}"), value=Transform(forward=swapped, inverse=swapped)),
    Rename("flat", "square", value=reshape(lambda s: (2, s[0] // 2), lambda s: (s[0] * s[1],))),
    Drop("mixins.freqs_{name}"),
)


def sample() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    names = {"flat": (6,), "mixins.freqs_sin.cached": (3,)}
    for n in (0, 11):
        names |= {f"layers.{n}.dense.weight": (4, 4), f"layers.{n}.dense.bias": (4,), f"norm.{n}": (8, 3)}
        names |= {f"layers.{n}.qkv.weight": (12, 4), f"layers.{n}.qkv.bias": (12,)}
        names |= {f"gate.{n}": (2, 5), f"up.{n}": (2, 5)}
    return {name: torch.randn(shape, generator=rng) for name, shape in names.items()}


def test_convert_applies_every_kind_of_rule():
    given = sample()
    got = convert(given, TABLE)
    assert torch.equal(got["blocks.11.k.weight"], given["layers.11.qkv.weight"][4:8])
    assert torch.equal(got["gate_up.0"], torch.cat([given["gate.0"], given["up.0"]], 1))
    assert torch.equal(got["a.0"], given["norm.0"][[0, 1, 4, 5]])
    assert got["square"].shape == (2, 3)
    assert not any("freqs" in name for name in got)


def test_invert_restores_all_that_was_not_dropped():
    given = sample()
    back = invert(convert(given, TABLE), TABLE)
    assert back.keys() == {name for name in given if "freqs" not in name}
    assert all(torch.equal(back[name], given[name]) for name in back)


def test_meta_tensors_convert_to_the_same_shapes():
    given = sample()
    meta = convert({name: x.to("meta") for name, x in given.items()}, TABLE)
    assert {k: v.shape for k, v in meta.items()} == {k: v.shape for k, v in convert(given, TABLE).items()}
    assert all(x.is_meta for x in meta.values())


def test_unmatched_keys_are_counted_and_the_first_shown():
    with pytest.raises(WeightsError, match=r"7 unmatched \(x0, x1, x2, x3, x4 and 2 more\)"):
        convert({f"x{i}": torch.zeros(1) for i in range(7)}, TABLE)


def test_two_rules_for_one_key_are_ambiguous():
    with pytest.raises(WeightsError, match=r"1 ambiguous \(flat\)"):
        convert({"flat": torch.zeros(4)}, (*TABLE, Drop("{name}")))


def test_half_a_merge_names_the_missing_half():
    with pytest.raises(WeightsError, match=r"1 missing \(up.3\)"):
        convert({"gate.3": torch.zeros(2, 2)}, TABLE)


def test_two_sources_of_one_name_are_refused():
    table = (Rename("a", "c"), Rename("b", "c"))
    with pytest.raises(WeightsError, match=r"1 written twice \(c\)"):
        convert({"a": torch.zeros(1), "b": torch.zeros(1)}, table)


def test_a_size_that_does_not_divide_is_named():
    with pytest.raises(WeightsError, match=r"layers.0.qkv.bias \[7\].*does not divide into 3"):
        convert({"layers.0.qkv.bias": torch.zeros(7)}, TABLE)


def test_placeholders_match_what_they_promise():
    for name in ("layers.x.dense.weight", "layers.0.dense.scale", "layers.0.0.dense.bias", "mixins.freqs_"):
        with pytest.raises(WeightsError, match="1 unmatched"):
            convert({name: torch.zeros(1)}, TABLE)
    twice = (Rename("a.{n}.{n}", "b.{n}"),)
    assert list(convert({"a.7.7": torch.zeros(1)}, twice)) == ["b.7"]
    with pytest.raises(WeightsError):
        convert({"a.7.8": torch.zeros(1)}, twice)


def test_a_rule_with_other_placeholders_on_its_sides_is_refused():
    with pytest.raises(ValueError, match="placeholders of 'b' differ"):
        Rename("a.{n}", "b")
    with pytest.raises(ValueError, match="unknown placeholder"):
        convert({"a": torch.zeros(1)}, (Rename("a.{z}", "b.{z}"),))


def test_transform_is_undone_on_the_way_back():
    table = (Rename("a", "b", value=Transform(forward=lambda x: x.flip(0), inverse=lambda x: x.flip(0))),)
    x = torch.arange(3)
    assert torch.equal(convert({"a": x}, table)["b"], torch.tensor([2, 1, 0]))
    assert torch.equal(invert(convert({"a": x}, table), table)["a"], x)


# ---- reading


def recorded_files() -> list[Path]:
    files = [
        p for name in ("cogvideo_ar", "cogvideox", "cogview2_sr") for p in case_folder(name).rglob("*.pt")
    ]
    assert files
    return files


def test_every_recorded_checkpoint_loads_tensors_only_and_alike_on_meta():
    for path in recorded_files():
        real, meta = load_tensors(path), load_tensors(path, device="meta")
        shapes = {name: (x.shape, x.dtype) for name, x in real.items()}
        assert shapes and shapes == {name: (x.shape, x.dtype) for name, x in meta.items()}
        assert all(x.is_meta for x in meta.values())


def test_sat_folder_is_followed_through_latest():
    for latest in (p for name in ("cogvideo_ar", "cogview2_sr") for p in case_folder(name).rglob("latest")):
        assert sat_checkpoint_file(latest.parent).parent.name == latest.read_text().strip()
        assert load_tensors(latest.parent).keys() == load_tensors(sat_checkpoint_file(latest.parent)).keys()


def make_sat(folder: Path, tag: str, *, name: str = "1000", ranks: int = 1) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / "latest").write_text(tag)
    for rank in range(ranks):
        file = folder / name / f"mp_rank_{rank:02d}_model_states.pt"
        torch.save({"module": {"w": torch.full((1,), float(rank))}}, file)
    return folder


@pytest.mark.parametrize(("tag", "name"), [("1000\n", "1000"), (" 0100 ", "100"), ("release", "release")])
def test_legal_tags(tmp_path, tag, name):
    assert sat_checkpoint_file(make_sat(tmp_path / "m", tag, name=name)).parent.name == name
    assert sat_checkpoint_file(tmp_path).parent.name == name  # one level too high


@pytest.mark.parametrize("tag", ["", "0", "-5", "newest", "1.5"])
def test_illegal_tags(tmp_path, tag):
    with pytest.raises(WeightsError, match="positive iteration number or 'release'"):
        sat_checkpoint_file(make_sat(tmp_path, tag))


def test_model_parallel_parts_come_in_rank_order(tmp_path):
    folder = make_sat(tmp_path, "1000", ranks=3)
    assert [load_tensors(p)["w"].item() for p in sat_checkpoint_files(folder)] == [0, 1, 2]
    with pytest.raises(WeightsError, match="3 model-parallel parts"):
        sat_checkpoint_file(folder)


def test_wrappers_are_opened_one_inside_the_other(tmp_path):
    torch.save({"model": {"state_dict": OrderedDict(w=torch.ones(2))}, "step": 3}, tmp_path / "a.pt")
    assert list(load_tensors(tmp_path / "a.pt")) == ["w"]


def test_numpy_random_state_loads_also_under_its_old_module_name(tmp_path):
    content = {"module": {"w": torch.ones(2)}, "np_rng_state": np.random.RandomState(0).get_state()}
    torch.save(content, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for item in new.infolist():
            data = new.read(item).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(item.filename, data)
    for name in ("new.pt", "old.pt"):
        assert torch.equal(load_tensors(tmp_path / name)["w"], torch.ones(2))


def test_code_in_a_pickle_is_refused_by_name(tmp_path):
    torch.save({"module": {"w": torch.ones(1)}, "args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"refused: it holds the Python type argparse.Namespace"):
        load_tensors(tmp_path / "a.pt")


def broken_files(folder: Path) -> dict[str, str]:
    whole = folder / "whole.pt"
    torch.save({"w": torch.ones(1000)}, whole)
    save_tensors({"w": torch.ones(1000)}, folder / "whole.safetensors")
    contents = {
        "cut.pt": (whole.read_bytes()[:-200], "truncated"),
        "cut.safetensors": ((folder / "whole.safetensors").read_bytes()[:-200], "truncated"),
        "pointer.safetensors": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "Git LFS",
        ),
        "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
        "page.bin": (b"<!DOCTYPE html><html>", "web page"),
        "empty.pt": (b"", "empty"),
        "text.pt": (b"hello world, this is text", "not a checkpoint"),
        "text.safetensors": (b"hello world, this is text", "not a safetensors file"),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    torch.save({"lr": 0.1}, folder / "numbers.pt")
    torch.save({"w": torch.ones(1), "lr": 0.1}, folder / "mixed.pt")
    reasons = {name: reason for name, (_, reason) in contents.items()}
    return reasons | {
        "numbers.pt": "no named tensors",
        "mixed.pt": "not tensors",
        "absent.pt": "No such file",
    }


def test_broken_files_give_one_line_that_names_file_and_reason(tmp_path):
    for name, reason in broken_files(tmp_path).items():
        with pytest.raises(WeightsError, match=reason) as caught:
            load_tensors(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def make_shards(folder: Path) -> dict[str, torch.Tensor]:
    given = {name: torch.randn(2) for name in "abc"}
    save_tensors({"a": given["a"]}, folder / "model-1.safetensors")
    save_tensors({"b": given["b"], "c": given["c"]}, folder / "model-2.safetensors")
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return given


def test_shards_are_joined_and_an_absent_one_is_named(tmp_path):
    given = make_shards(tmp_path)
    got = load_tensors(tmp_path)
    assert got.keys() == given.keys() and all(torch.equal(got[name], given[name]) for name in given)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"absent: 1 of 2 \(model-2.safetensors\)"):
        load_tensors(tmp_path)


def test_a_shard_without_its_tensors_is_an_error(tmp_path):
    make_shards(tmp_path)
    save_tensors({"b": torch.ones(1)}, tmp_path / "model-2.safetensors")
    with pytest.raises(WeightsError, match=r"1 missing \(c\)"):
        load_tensors(tmp_path)


def test_folders_with_no_file_or_too_many(tmp_path):
    with pytest.raises(WeightsError, match="no weight file in"):
        load_tensors(tmp_path)
    for name in "ab":
        save_tensors({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match="several weight files"):
        load_tensors(tmp_path)


# ---- writing and loading


def test_saved_views_and_ties_come_back_with_metadata(tmp_path):
    whole = torch.arange(12.0).reshape(4, 3)
    given = {"view": whole[1:3], "turned": whole.T, "tie1": whole, "tie2": whole, "half": whole.bfloat16()}
    path = save_tensors(given, tmp_path / "new" / "a.safetensors", {"step": "7"})
    got = load_tensors(path)
    assert all(torch.equal(got[name], given[name]) and got[name].dtype == given[name].dtype for name in given)
    assert load_metadata(path) == {"step": "7"}
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = save_tensors({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(TypeError):
        save_tensors({"w": torch.zeros(1)}, path, {"step": 7})  # type: ignore[dict-item] - must be text
    assert load_tensors(path)["w"].item() == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_path_below_a_file_is_an_output_path_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputPathError, match="cannot write"):
        save_tensors({"w": torch.ones(1)}, tmp_path / "file" / "a.safetensors")


def test_load_into_fills_meta_and_real_models_alike():
    weights = {name: x.detach() for name, x in nn.Linear(3, 2).state_dict().items()}
    with torch.device("meta"):
        meta = nn.Linear(3, 2)
    for model in (meta, nn.Linear(3, 2)):
        load_into(model, weights)
        assert torch.equal(model.weight, weights["weight"]) and model.weight.requires_grad
    with torch.device("meta"):
        assert load_into(nn.Linear(3, 2), weights, dtype=torch.float16).weight.dtype == torch.float16


def test_load_into_lists_all_differences():
    weights = {"weight": torch.zeros(3, 3), "scale": torch.zeros(1)}
    with pytest.raises(WeightsError) as caught:
        load_into(nn.Linear(3, 2), weights)
    for part in ("Linear", "1 missing (bias)", "1 unexpected (scale)", "weight [3, 3] instead of [2, 3]"):
        assert part in str(caught.value)


def test_load_into_notices_buffers_that_stay_empty():
    with torch.device("meta"):
        model = nn.Linear(2, 2, bias=False)
        model.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(WeightsError, match=r"1 empty \(table\)"):
        load_into(model, {"weight": torch.zeros(2, 2)})
