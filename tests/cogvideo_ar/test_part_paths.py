"""Parts that lie elsewhere: each alone and all together give what the whole folder gives, in either form;
what is missing or does not belong is refused before weights are read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo_ar import CogVideoPipeline, Options
from cogvideo_ar.__main__ import main
from cogvideo_ar.formats import convert_folder, open_folder
from cogvideo_ar.part_files import NETS
from cogvideo_ar.part_paths import NAMES, PartPaths
from cogvideo_ar.parts import Parts, load_parts, save_parts
from shared.checkpoints import invert, load_tensors, save_tensors
from shared.errors import WeightsError
from tests.cogvideo_ar.released_parts import write_released
from tests.cogvideo_ar.test_pipeline_super_resolution import with_refinement, with_super_resolution
from tests.cogvideo_ar.tiny_pipeline import tiny_parts

CPU = torch.device("cpu")
DIFFUSION = Path(__file__).parents[2] / "cogvideox_diff" / "demo"
PROMPT = "a red circle"
FILES = {name: f"{net.field}.safetensors" for name, net in NETS.items()} | {
    "text_model_path": "ice_text.model"
}
pytestmark = pytest.mark.filterwarnings("ignore:.*has no cluster_label2.npy")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    parts = with_refinement(with_super_resolution(tiny_parts(folder)))
    return save_parts(parts, folder / "whole")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same sizes and other numbers."""
    folder = tmp_path_factory.mktemp("other")
    parts = with_refinement(with_super_resolution(tiny_parts(folder, seed=7)))
    return save_parts(parts, folder / "whole")


def video(source: Path, parts: PartPaths | None = None) -> torch.Tensor:
    pipeline = CogVideoPipeline.from_pretrained(source, device="cpu", parts=parts)
    options = Options(num_frames=9, super_resolution="direct+iterative")
    return pipeline.configured(options)(PROMPT, seed=3).frames


@pytest.fixture(scope="module")
def expected(model: Path) -> torch.Tensor:
    return video(model)


def elsewhere(model: Path, name: str, form: str, folder: Path) -> Path:
    """The part `name` of a model as a file, as a model folder, or in its released form, in `folder`."""
    if form == "folder":
        return model
    folder.mkdir(parents=True, exist_ok=True)
    if name == "text_model_path" or form == "file":
        return Path(shutil.copy(model / FILES[name], folder / f"of_mine_{FILES[name]}"))
    parts = load_parts(model, torch.float32, CPU)
    tensors = invert(getattr(parts, NETS[name].field).state_dict(), NETS[name].table)
    content = {"module": {key: x.contiguous() for key, x in tensors.items()}}
    if name == "codec_path":
        torch.save(content, folder / "ice_image.pt")
        return folder / "ice_image.pt"
    checkpoint = folder / name.removesuffix("_path")
    (checkpoint / "release").mkdir(parents=True)
    torch.save(content, checkpoint / "release" / "mp_rank_00_model_states.pt")
    (checkpoint / "latest").write_text("release")
    return checkpoint


# ---- what they give


@pytest.mark.parametrize("form", ["file", "folder", "released"])
@pytest.mark.parametrize("name", NAMES)
def test_each_part_alone_gives_what_the_whole_folder_gives(
    model: Path, other: Path, expected: torch.Tensor, tmp_path: Path, name: str, form: str
) -> None:
    """The folder's own part is wrong or missing, so that it would be noticed."""
    if form == "folder" and name == "text_model_path":
        pytest.skip("a text model is a file")
    base = shutil.copytree(model, tmp_path / "base")
    if form == "folder" and name != "codec_path":
        shutil.copy(other / FILES[name], base / FILES[name])
        if name == "stage1_path":  # stage 2 stays the model's, with the base that it shared
            shutil.copy(model / "keyframes.safetensors", base / "keyframes.safetensors")
    else:
        (base / FILES[name]).unlink()
    path = elsewhere(model, name, form, tmp_path / "elsewhere")
    assert torch.equal(video(base, PartPaths(**{name: path})), expected)


def test_all_parts_elsewhere(model: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    paths = PartPaths(**{name: elsewhere(model, name, "file", tmp_path / name) for name in NAMES})
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "cluster_labels.safetensors"):
        shutil.copy(model / name, base)
    assert torch.equal(video(base, paths), expected)


def states(parts: Parts) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": x for i, net in enumerate(parts.nets) for name, x in net.state_dict().items()}


def test_a_stage_brings_its_settings_and_leaves_the_other_its_base(
    model: Path, other: Path, tmp_path: Path
) -> None:
    """Stage 1 of another model, with windows: stage 2 keeps what it shared with the stage 1 of before."""
    changed = load_parts(other, torch.float32, CPU)
    windows = replace(changed.config.keyframes, temporal="window", window=2)
    config = replace(changed.config, keyframes=windows)
    home = save_parts(replace(changed, config=config), tmp_path / "windows")
    for path in (home, home / "keyframes.safetensors"):
        folder = open_folder(model, PartPaths(stage1_path=path))
        assert folder.config.keyframes == windows
        parts, before = folder.load(torch.float32, CPU), load_parts(model, torch.float32, CPU)
        for net, same in ((parts.keyframes, changed.keyframes), (parts.interpolation, before.interpolation)):
            expected = same.state_dict()
            assert all(torch.equal(x, expected[name]) for name, x in net.state_dict().items())
    second = open_folder(model, PartPaths(stage2_path=home)).load(torch.float32, CPU)
    expected = changed.interpolation.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in second.interpolation.state_dict().items())


def test_what_stages_share_is_held_once(model: Path, tmp_path: Path) -> None:
    path = elsewhere(model, "stage2_path", "released", tmp_path)
    parts = open_folder(model, PartPaths(stage2_path=path)).load(torch.float32, CPU)
    tables = {net.word_embeddings.weight.data_ptr() for net in (parts.keyframes, parts.interpolation)}
    assert len(tables) == 1


# ---- released parts


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_released(tmp_path_factory.mktemp("released"))


RELEASED = {
    "stage1_path": "cogvideo-stage1",
    "stage2_path": "cogvideo-stage2",
    "codec_path": "ice_image.pt",
    "text_model_path": "ice_text.model",
}


def moved(released: Path, folder: Path, names: list[str]) -> PartPaths:
    """Parts, each in a folder of its own and with another name."""
    paths = {}
    for name in names:
        (folder / name).mkdir()
        paths[name] = (folder / RELEASED[name]).rename(folder / name / f"of_mine_{RELEASED[name]}")
    return PartPaths(**paths)


@pytest.mark.parametrize("name", RELEASED)
def test_each_released_part_alone(released: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(released, tmp_path / "a")
    paths = moved(released, folder, [name])
    outside = (folder / name).rename(tmp_path / "outside") / paths.given[name].name
    pointed = open_folder(folder, PartPaths(**{name: outside}))
    whole = open_folder(released)
    assert pointed.config == whole.config and pointed.mark != whole.mark
    got, wanted = (states(f.load(torch.float32, CPU)) for f in (pointed, whole))
    assert got.keys() == wanted.keys() and all(torch.equal(x, wanted[key]) for key, x in got.items())


def test_released_parts_need_no_folder(released: Path, tmp_path: Path, capsys: Any) -> None:
    folder = shutil.copytree(released, tmp_path / "a")
    paths = moved(released, folder, list(RELEASED))
    pointed, whole = open_folder("demo", paths), open_folder(released)
    assert pointed.config == whole.config and pointed.dtype == torch.float16 and pointed.path is None
    got, wanted = (states(f.load(torch.float16, CPU)) for f in (pointed, whole))
    assert got.keys() == wanted.keys() and all(torch.equal(x, wanted[key]) for key, x in got.items())
    flags = [word for name, path in paths.given.items() for word in (f"--{name}", str(path))]
    clusters = ["--clusters", str(folder / "cluster_label2.npy")]
    for verb in (["generate", "--prompt", "a", "--dry_run", *clusters], ["plan"]):
        assert main([*verb, *flags, "--device", "cpu", "--json"]) in (0, 4)  # 4: does not fit
        assert json.loads(capsys.readouterr().out)["settings"]["num_frames"] == 33
    command = ["convert", "--model_path", str(tmp_path), "--output_path", str(tmp_path / "b"), *flags]
    assert main(command) == 0
    assert open_folder(tmp_path / "b").config == whole.config


def test_parts_of_this_project_do_not_join_released_ones(released: Path, tmp_path: Path) -> None:
    own = convert_folder(released, tmp_path / "own")
    with pytest.raises(WeightsError, match=r"--stage1_path: .*\(cogvideo-ar convert --model_path"):
        open_folder(released, PartPaths(stage1_path=own / "keyframes.safetensors"))


# ---- what is refused, and when


def refuse(*args: Any, **options: Any) -> Parts:
    raise AssertionError("weights were read")


def generate(model: Path | str, output: Path, *words: object) -> int:
    flags = [
        "generate",
        "--prompt",
        PROMPT,
        "--model_path",
        model,
        "--output_path",
        output,
        "--num_frames",
        5,
    ]
    return main([str(word) for word in (*flags, "--device", "cpu", "--json", *words)])


def refused(model: Path, other: Path, tmp_path: Path) -> dict[str, tuple[Path, PartPaths, str]]:
    """What is tried: a source, parts, and what the reason must say."""
    stage = elsewhere(other, "stage1_path", "released", tmp_path)
    dsr = elsewhere(other, "super_resolution_path", "released", tmp_path)
    codec = elsewhere(other, "codec_path", "released", tmp_path)
    odd = {name: x[..., :3] for name, x in load_tensors(model / "vqvae.safetensors").items()}
    save_tensors(odd, tmp_path / "odd.safetensors")
    (tmp_path / "broken.model").write_text("no text model")
    demo = Path("demo")
    return {
        "missing": (
            model,
            PartPaths(codec_path=tmp_path / "ice_imag.pt"),
            f"no {tmp_path}/ice_imag.pt; near",
        ),
        "nearest": (model, PartPaths(codec_path=tmp_path / "ice_imag.pt"), f"nearest: {codec}"),
        "folder": (model, PartPaths(codec_path=tmp_path / "x" / "y"), f"nor a folder {tmp_path / 'x'}"),
        "file": (model, PartPaths(stage2_path=other / "keyframes.safetensors"), "is for --stage1_path"),
        "kind": (model, PartPaths(stage1_path=dsr), "is direct super-resolution; nearest: --super_res"),
        "codec": (model, PartPaths(super_resolution_path=codec), "is the image codec; nearest: --codec_path"),
        "family": (model, PartPaths(stage1_path=DIFFUSION), "family 'cogvideox_diff', not 'cogvideo_ar'"),
        "names": (model, PartPaths(codec_path=DIFFUSION / "vae.safetensors"), "does not fit the model"),
        "shapes": (model, PartPaths(codec_path=tmp_path / "odd.safetensors"), "does not fit the model"),
        "text": (model, PartPaths(text_model_path=tmp_path / "broken.model"), "broken.model"),
        "sizes": (demo, PartPaths(stage1_path=stage), "give --stage2_path, --codec_path, --text_model_path"),
        "grid": (demo, PartPaths(stage1_path=other), "has the grid"),
    }


CASES = ("missing", "nearest", "folder", "file", "kind", "codec", "family", "names", "shapes", "text",
         "sizes", "grid")  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_belong_is_refused_before_weights_are_read(
    model: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, case: str
) -> None:
    source, paths, reason = refused(model, other, tmp_path)[case]
    monkeypatch.setattr("cogvideo_ar.formats.load_parts", refuse)
    with pytest.raises(WeightsError) as caught:
        open_folder(source, paths)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    words = [word for name, path in paths.given.items() for word in (f"--{name}", path)]
    assert generate(source, tmp_path / "out", *words) == 3
    assert reason in json.loads(capsys.readouterr().out)["reason"] and not (tmp_path / "out").exists()


# ---- the command line


def test_the_sidecar_says_where_parts_were(model: Path, other: Path, tmp_path: Path, capsys: Any) -> None:
    path = elsewhere(model, "codec_path", "released", tmp_path)
    assert generate(model, tmp_path / "a", "--codec_path", path, "--super_resolution", "none") == 0
    said = [json.loads(file.read_text()) for file in (tmp_path / "a").glob("*.json")]
    sidecar = next(content for content in said if "settings" in content and "inputs" in content)
    assert sidecar["inputs"]["parts"]["codec_path"]["path"] == str(path)
    assert len(sidecar["inputs"]["parts"]["codec_path"]["mark"]) == 16
    pipeline = CogVideoPipeline.from_pretrained(model, device="cpu", parts=PartPaths(codec_path=path))
    assert sidecar["settings"]["weights"] == pipeline.settings()["weights"]
    assert sidecar["settings"]["weights"] != CogVideoPipeline.from_pretrained(model).settings()["weights"]


def test_plan_and_convert_refuse_flags_that_mean_nothing(model: Path, tmp_path: Path, capsys: Any) -> None:
    flag = ["--codec_path", str(model / "vqvae.safetensors")]
    assert main(["plan", "--preset", "cogvideo-demo", *flag]) == 2
    assert "--codec_path: a preset has no files" in capsys.readouterr().err
    back = ["convert", "--to", "sat", "--model_path", str(model), "--output_path", str(tmp_path / "a")]
    assert main([*back, *flag]) == 2 and "--to own" in capsys.readouterr().err
