"""Folders with the released parts: the recorded checkpoints in the real format, a codec and a text model of
fitting sizes, read as they are and converted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo_ar.__main__ import main
from cogvideo_ar.config import VQVAEConfig, cogvideo, cogview2_dsr
from cogvideo_ar.formats import convert_folder, export_folder, open_folder
from cogvideo_ar.generation import GreedySampler, StageSamplers
from cogvideo_ar.keyframes import generate_first_frames
from cogvideo_ar.options import Options
from cogvideo_ar.part_paths import PartPaths
from cogvideo_ar.parts import load_parts
from cogvideo_ar.pipeline import CogVideoPipeline
from cogvideo_ar.sat_export import save_sat
from cogvideo_ar.sat_layout import SatFolder, checkpoint_kind, codec_config, fine_config, stage_config
from shared.checkpoints import convert, load_tensors
from shared.errors import OutputPathError, SettingError, WeightsError
from tests.cogvideo_ar.released_parts import NUM_IMAGE_TOKENS, RECORDED, START, TABLE, write_released
from tests.parity.recorded import case_folder, read_json, read_tensors

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*has no cluster_label2.npy"),
]
CPU = torch.device("cpu")


class TableTokenizer:
    """One character per token, as recorded."""

    def encode(self, text: str) -> list[int]:
        return [self.id_of(character) for character in text]

    def id_of(self, piece: str) -> int:
        return NUM_IMAGE_TOKENS + TABLE["table"].index(piece)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_released(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def converted(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_folder(released, tmp_path_factory.mktemp("converted") / "model")


def test_greedy_first_frame_through_the_converted_folder(converted: Path):
    """The tokens that the upstream pipeline gave from the same checkpoints."""
    name = "e2e_1_first_frame"
    case = read_json(RECORDED / "inference_cases.json")[name]
    recorded = read_tensors(RECORDED / "inference_cases.safetensors")[f"{name}.out"]
    parts = load_parts(converted, torch.float64, CPU)
    template = parts.config.sampling.prompts.first_frame
    prompt = case["text"].removesuffix(template.removeprefix("{prompt}"))
    greedy = StageSamplers(first_frame=GreedySampler(), default=GreedySampler())
    frames = generate_first_frames(
        parts.keyframes, TableTokenizer(), [prompt], parts.config.sampling, greedy, [torch.Generator()]
    )
    expected = recorded[:, case["call"]["text_len"] + 1 :].long()
    assert torch.equal(frames[:, 0], expected)


def test_the_converted_folder_is_the_released_one(released: Path, converted: Path):
    """Same settings, same numbers, what the stages share only once; and nothing is rounded on the way."""
    folder, own = open_folder(released), open_folder(converted)
    assert folder.config == own.config and folder.dtype == own.dtype == torch.float16
    assert folder.clusters is not None and own.clusters is not None
    read, again = (f.load(torch.float16, CPU) for f in (folder, own))
    for net in ("keyframes", "interpolation", "vqvae"):
        states: list[dict[str, Tensor]] = [getattr(parts, net).state_dict() for parts in (read, again)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]), net
    table = read.keyframes.word_embeddings.weight.data_ptr()
    assert read.interpolation.word_embeddings.weight.data_ptr() == table
    own_names = {name for name, _ in read.interpolation.temporal_parameters()}
    assert load_tensors(converted / "interpolation.safetensors").keys() == own_names
    assert read.cluster_labels is not None and again.cluster_labels is not None
    assert torch.equal(read.cluster_labels, again.cluster_labels)


def test_settings_follow_the_files(released: Path):
    config = open_folder(released).config
    for stage, net in ((1, config.keyframes), (2, config.interpolation)):
        facts = read_json(released / f"cogvideo-stage{stage}" / "model_config.json")
        assert (net.num_layers, net.num_heads, net.hidden_size) == (
            *(facts["num_layers"], facts["num_attention_heads"]),
            facts["hidden_size"],
        )
        assert net.frame_len == facts["layout"][1] - facts["layout"][0]
        assert (net.start_of_image, net.num_image_tokens) == (START, NUM_IMAGE_TOKENS)
        assert net.window == max(facts["window_size"], 0)
    assert (config.keyframes.temporal, config.interpolation.temporal) == ("full", "window")
    assert config.sampling == cogvideo().sampling and config.super_resolution is None


def test_the_pipeline_opens_it(released: Path):
    pipeline = CogVideoPipeline.from_pretrained(released, device="cpu")
    assert pipeline.settings()["dtype"] == "float16" and pipeline.settings()["token_clusters"]
    assert (pipeline.plan.num_frames, pipeline.plan.height) == (33, 160)


def test_generate_takes_it(released: Path, capsys: pytest.CaptureFixture[str]):
    command = [
        "generate",
        "--model_path",
        str(released),
        "--prompt",
        "a",
        "--dry_run",
        "--json",
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings == CogVideoPipeline.from_pretrained(released, device="cpu").settings()


# ---- which stage is which


def edited(released: Path, folder: Path, change: Callable[[int, dict[str, Any]], None] | None) -> Path:
    """A copy whose checkpoints have other names; `change` edits what they say, None removes it."""
    shutil.copytree(released, folder)
    for stage, name in ((1, "second"), (2, "first")):
        path = (folder / f"cogvideo-stage{stage}").rename(folder / name) / "model_config.json"
        facts = read_json(path)
        path.unlink()
        if change is not None:
            change(stage, facts)
            path.write_text(json.dumps(facts), encoding="utf-8")
    return folder


def test_the_content_says_more_than_names(released: Path, tmp_path: Path):
    folder = edited(released, tmp_path / "a", lambda stage, facts: None)
    assert [path.name for path in SatFolder(folder).stages] == ["second", "first"]
    (folder / "second").rename(folder / "cogvideo-stage2")
    (folder / "first").rename(folder / "cogvideo-stage1")
    assert [path.name for path in SatFolder(folder).stages] == ["cogvideo-stage2", "cogvideo-stage1"]


def test_stages_that_nothing_tells_apart(released: Path, tmp_path: Path):
    """The released names decide where both files say the same; else the caller is asked, and may answer."""

    def same(stage: int, facts: dict[str, Any]) -> None:
        facts["cogvideo_stage"] = 1

    folder = edited(released, tmp_path / "a", same)
    with pytest.raises(WeightsError, match=r"first, second .*--stage1_path and --stage2_path"):
        open_folder(folder).config  # noqa: B018 - reading it is the test
    named = SatFolder(folder, PartPaths(stage1_path=folder / "second", stage2_path=folder / "first"))
    assert named.config == open_folder(released).config
    (folder / "second").rename(folder / "cogvideo-stage1")
    (folder / "first").rename(folder / "cogvideo-stage2")
    assert [path.name for path in SatFolder(folder).stages] == ["cogvideo-stage1", "cogvideo-stage2"]


def test_convert_is_a_verb(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, target = (
        edited(released, tmp_path / "a", lambda stage, facts: facts.pop("cogvideo_stage")),
        tmp_path / "b",
    )
    command = ["convert", "--model_path", str(folder), "--output_path", str(target), "--dtype", "bfloat16"]
    assert main(command) == 3 and "--stage1_path" in capsys.readouterr().err
    command += ["--stage1_path", str(folder / "second"), "--stage2_path", str(folder / "first")]
    assert main(command) == 0 and capsys.readouterr().out == f"{target}\n"
    assert load_tensors(target / "keyframes.safetensors")["final_norm.bias"].dtype == torch.bfloat16
    assert main(command) == 2 and "already holds a model" in capsys.readouterr().err
    with pytest.raises(OutputPathError):
        convert_folder(folder, target)
    with pytest.raises(WeightsError, match="nothing to convert"):
        convert_folder(target, tmp_path / "c")


def test_the_way_back_gives_the_released_files(released: Path, converted: Path, tmp_path: Path, capsys):
    """Names, numbers, types and settings; a second time only with --overwrite."""
    command = ["convert", "--to", "sat", "--model_path", str(converted), "--output_path", str(tmp_path / "a")]
    assert main(command) == 0 and capsys.readouterr().out == f"{tmp_path / 'a'}\n"
    for part in ("cogvideo-stage1", "cogvideo-stage2", "ice_image.pt"):
        before, after = (load_tensors(folder / part) for folder in (released, tmp_path / "a"))
        assert before.keys() == after.keys()
        assert all(torch.equal(x, after[name]) and x.dtype == after[name].dtype for name, x in before.items())
    for stage in (1, 2):
        name = f"cogvideo-stage{stage}/model_config.json"
        assert read_json(tmp_path / "a" / name) == read_json(released / name)
    for name in ("ice_text.model", "cluster_label2.npy"):
        assert (tmp_path / "a" / name).read_bytes() == (released / name).read_bytes()
    assert open_folder(tmp_path / "a").config == open_folder(released).config
    assert main(command) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_what_the_released_layout_cannot_say_is_refused(converted: Path, tmp_path: Path, capsys):
    command = ["convert", "--to", "sat", "--model_path", "demo", "--output_path", str(tmp_path / "a")]
    assert main(command) == 2
    assert "cannot hold keyframes of these sizes: num_positions must be" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    parts = open_folder(converted).load(torch.float16, CPU)
    local = replace(parts.config.keyframes, temporal="local", extent=(5, 5, 5))
    with pytest.raises(
        SettingError, match="cannot say that keyframes has the temporal 'local'; it means 'full'"
    ):
        save_sat(replace(parts, config=replace(parts.config, keyframes=local)), tmp_path / "a")


# ---- parts


@pytest.mark.parametrize("name", ["ice_image.pt", "ice_text.model"])
def test_missing_files_are_named(released: Path, tmp_path: Path, name: str):
    folder = shutil.copytree(released, tmp_path / "a")
    nested = folder / "icetk"
    nested.mkdir()
    (folder / name).rename(nested / name)
    assert SatFolder(folder).config == SatFolder(released).config
    (nested / name).unlink()
    with pytest.raises(WeightsError, match=rf"lacks {name} \(the "):
        CogVideoPipeline.from_pretrained(folder, device="cpu")


def test_a_stage_that_is_not_there(released: Path, tmp_path: Path):
    folder = shutil.copytree(released, tmp_path / "a")
    shutil.rmtree(folder / "cogvideo-stage2")
    with pytest.raises(WeightsError, match="has 1 checkpoints of CogVideo's stages"):
        CogVideoPipeline.from_pretrained(folder, device="cpu")


def test_no_clusters_is_said(released: Path, tmp_path: Path):
    folder = shutil.copytree(released, tmp_path / "a")
    (folder / "cluster_label2.npy").unlink()
    with pytest.warns(UserWarning, match="top_k counts single tokens"):
        assert SatFolder(folder).load(torch.float16, CPU).cluster_labels is None


def test_super_resolution_is_a_part(released: Path, tmp_path: Path):
    """The direct checkpoint and the iterative one are read and converted. The recorded vocabulary is smaller
    than that of the stages, so the tables are enlarged."""
    folder = shutil.copytree(released, tmp_path / "a")
    for name in ("cogview2-dsr", "cogview2-itersr"):
        shutil.copytree(case_folder("cogview2_sr") / name, folder / name)
    tensors, refining = (_with_larger_table(folder / name) for name in ("cogview2-dsr", "cogview2-itersr"))
    target = convert_folder(folder, tmp_path / "b")
    config = open_folder(target).config.super_resolution
    assert config is not None and config.fine_grid == cogview2_dsr().fine_grid
    assert (config.text_len, config.start_of_image) == (96, START)
    pipeline = CogVideoPipeline.from_pretrained(target, device="cpu")
    assert (pipeline.plan.height, pipeline.plan.width) == (480, 480)
    from cogvideo_ar.checkpoints import SAT_DSR, SAT_ITERSR

    expected, model = convert(tensors, SAT_DSR), pipeline.parts.super_resolution
    assert model is not None
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
    expected, model = convert(refining, SAT_ITERSR), pipeline.parts.refinement
    assert model is not None and model.config.kind == "iterative" and model.config.text_len == 16
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
    assert pipeline.plan.refinement == () and pipeline.configured(
        Options(super_resolution="direct+iterative")
    ).plan.refinement == (40, 40, 40, 20, 20, 10)
    back = export_folder(target, tmp_path / "c")
    for name, written in (("cogview2-dsr", tensors), ("cogview2-itersr", refining)):
        again = load_tensors(back / name)
        assert again.keys() == written.keys() and all(torch.equal(again[n], x) for n, x in written.items())
        for key, value in read_json(back / name / "model_config.json").items():
            assert key == "vocab_size" or value == read_json(folder / name / "model_config.json")[key], key


def test_a_folder_that_is_overwritten_keeps_nothing_of_the_model_before(converted: Path, tmp_path: Path):
    folder = export_folder(converted, tmp_path / "a")
    shutil.copytree(case_folder("cogview2_sr") / "cogview2-dsr", folder / "cogview2-dsr")
    _with_larger_table(folder / "cogview2-dsr")
    before = SatFolder(folder)
    assert before.clusters is not None and before.config.super_resolution is not None
    parts = open_folder(converted).load(torch.float16, CPU)
    save_sat(replace(parts, cluster_labels=None), folder)
    after = SatFolder(folder)
    assert after.clusters is None and after.config.super_resolution is None


def _with_larger_table(checkpoint: Path) -> dict[str, Tensor]:
    file = next(checkpoint.glob("*/*.pt"))
    tensors = {name: x.clone() for name, x in load_tensors(file).items()}
    table = tensors["transformer.word_embeddings.weight"]
    tensors["transformer.word_embeddings.weight"] = table.repeat(NUM_IMAGE_TOKENS // len(table) + 1, 1)
    torch.save({"module": tensors}, file)
    return tensors


# ---- sizes of the release


def manifest(entries: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in entries.items()}


def test_released_sizes_give_the_presets():
    """Even where model_config.json is missing."""
    preset = cogvideo()
    tensors = manifest(read_json(RECORDED / "full_size_manifest.json")["parameters"])
    ids = {"num_image_tokens": 20000, "start_of_image": 150000, "pad_token": 20003}
    assert checkpoint_kind(tensors) == "stage" and stage_config(tensors, {}, ids) == preset.keyframes
    entries = read_json(case_folder("icetk") / "vqvae_full_manifest.json")["entries"]
    assert codec_config(manifest({entry["name"]: entry["shape"] for entry in entries})) == VQVAEConfig()
    facts = read_json(case_folder("cogview2_sr") / "full_manifest.json")["cogview2-dsr"]
    first, last = facts["layer_index_range"]
    named = dict(facts["other"])
    for layer in range(first, last + 1):
        named |= {key.format(i=layer): shape for key, shape in facts["per_layer"].items()}
    tensors = manifest(named)
    del ids["pad_token"]
    assert checkpoint_kind(tensors) == "direct" and fine_config(tensors, {}, ids) == cogview2_dsr()
