"""Pains of users of the released code (docs/reliability.md numbers them), on the command line of this one;
the page's table names a test for every pain, and all of them exist."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from shared.video_io import read_video
from tests.reliability.families import PROMPT, ROOT, Family, sidecar

PAINS = 25
PAGE = ROOT / "docs" / "reliability.md"


# ---- the table


def rows() -> dict[int, str]:
    text = PAGE.read_text(encoding="utf-8")
    return {int(number): row for number, row in re.findall(r"^\| (\d+) \|(.*)$", text, re.MULTILINE)}


def defined_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_pain_has_a_row() -> None:
    assert sorted(rows()) == list(range(1, PAINS + 1))


@pytest.mark.parametrize("number", range(1, PAINS + 1))
def test_every_row_names_tests_that_exist(number: int) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", rows()[number])
    assert named
    for file, name in named:
        assert name.startswith("test_") and name in defined_in(ROOT / file), f"{file}::{name}"


# ---- 1: half precision that overflows


def test_float16_is_refused_for_a_model_of_bfloat16(cogvideox: Family, tmp_path: Path, capsys) -> None:
    shutil.copytree(cogvideox.model, model := tmp_path / "model")
    header = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(header | {"dtype": "bfloat16"}))
    assert cogvideox.generate(tmp_path / "a.mp4", "--dtype", "float16", model=model) == 2
    said = capsys.readouterr().err
    assert "bfloat16" in said and "float32" in said and said.count("\n") == 1


# ---- 2 and 3: counts and sizes


@pytest.mark.parametrize("count", [4, 13, 50])
def test_a_count_of_frames_is_made_or_refused_with_the_nearest(
    family: Family, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = family.generate(tmp_path / "a.mp4", "--num_frames", count, "--dry_run")
    said = capsys.readouterr()
    assert code == 2 and re.search(r"(nearest|legal): ", said.err) and said.err.count("\n") == 1


@pytest.mark.parametrize("count", [9, 17])
def test_a_legal_count_is_the_count_of_the_file(family: Family, count: int, tmp_path: Path) -> None:
    assert family.generate(tmp_path / "a.mkv", "--num_frames", count) == 0
    assert read_video(tmp_path / "a.mkv").num_frames == sidecar(tmp_path / "a.mkv")["frames"] == count


@pytest.mark.parametrize(("flag", "value"), [("--height", 40), ("--height", 458), ("--width", 47)])
def test_a_size_is_refused_before_weights_are_read(
    cogvideox: Family, flag: str, value: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cogvideox.model, model := tmp_path / "model")
    (model / "transformer.safetensors").write_bytes(b"not read yet")
    assert cogvideox.generate(tmp_path / "a.mp4", flag, value, model=model) == 2
    assert "nearest" in (said := capsys.readouterr().err) and said.count("\n") == 1


# ---- 7: prompts that are no file names, and batches that do not divide


AWKWARD = (
    "a_b_c",
    "a; touch boom",
    "../../outside",
    "a" * 300,
    "$(boom)",
    "\u5706 red",
    "con",
    "-",
    "\U0001f600",
)


def test_awkward_prompts_make_files_like_any_other(family: Family, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "runs" / "out"
    prompts.write_text("".join(f"{prompt}\n" for prompt in AWKWARD), encoding="utf-8")
    code = family.main(
        "generate", "--prompt_file", prompts, "--output_path", out, "--model_path", family.model,
        "--device", "cpu", "--quiet", "--num_frames", 9,
    )  # fmt: skip
    items = json.loads((out / "run.json").read_text(encoding="utf-8"))["items"]
    assert [item["prompt"] for item in items] == list(AWKWARD)
    made = [item for item in items if item["status"] == "made"]
    assert code in (0, 7) and len(made) >= len(AWKWARD) - 2, [i.get("reason") for i in items]
    for item in made:
        known = sidecar(Path(item["path"]))
        assert known["prompt"] == item["prompt"] and Path(item["path"]).parent == out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "runs"]


# ---- 13: options that are accepted and ignored


def test_three_videos_are_three_and_differ(family: Family, tmp_path: Path) -> None:
    assert family.generate(tmp_path / "out", "--num_videos_per_prompt", 3, "--num_frames", 9) == 0
    videos = sorted((tmp_path / "out").glob("*.mp4"))
    frames = {read_video(path).frames.numpy().tobytes() for path in videos}
    assert len(videos) == len(frames) == 3
    assert [sidecar(path)["seed"] for path in videos] == [0, 1, 2]


@pytest.mark.parametrize(
    "words",
    [("--generate_type", "t2vv"), ("--dtype", "float8"), ("--scheduler", "ddmi"), ("--set", "no_such=1"),
     ("--offload", "yes"), ("--num_framse", "9"), ("--num_frame", "9"), ("--quiet=no",), ("--seed", "1.5")],
)  # fmt: skip
def test_what_is_not_known_is_refused(
    cogvideox: Family, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cogvideox.generate(tmp_path / "a.mp4", *words) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "a.mp4").exists()


def test_float32_is_float32_and_every_setting_is_told(family: Family, tmp_path: Path) -> None:
    assert family.generate(tmp_path / "a.mp4", "--dtype", "float32", "--seed", 7) == 0
    known = sidecar(tmp_path / "a.mp4")
    assert (known["dtype"], known["seed"], known["prompt"]) == ("float32", 7, PROMPT)
    assert known["settings"] and known["settings_hash"] and "--seed 7" in known["command"]


# ---- 14 and 6: names of folders, and where one stands


@pytest.mark.parametrize("name", ["CogVideoX-5B-I2V-1.5 int8", "\u6a21\u578b.mp4"])
def test_a_model_is_known_by_its_content(
    family: Family, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(family.model, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert family.generate(Path("a.mkv"), model=Path(name)) == 0
    assert family.generate(tmp_path / "b.mkv") == 0
    assert Path("a.mkv").read_bytes() == Path("b.mkv").read_bytes()


# ---- 16 and 22: what a video's file says


def test_every_stage_says_its_time_and_memory(family: Family, tmp_path: Path) -> None:
    assert family.generate(tmp_path / "a.mp4") == 0
    stages = sidecar(tmp_path / "a.mp4")["stages"]
    assert {"text", "decode"} < stages.keys() and any(name.startswith("model") for name in stages)
    assert all(stage["seconds"] >= 0 and stage["peak_bytes"] >= 0 for stage in stages.values())


def test_the_end_of_a_long_prompt_that_is_not_used_is_told(cogvideox: Family, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    words = (
        "generate",
        "--prompt",
        f"{PROMPT} " * 40,
        "--model_path",
        cogvideox.model,
        "--output_path",
        path,
    )
    assert cogvideox.main(*words, "--device", "cpu", "--quiet") == 0
    assert any("its end is not used" in warning for warning in sidecar(path)["warnings"])


# ---- 25: output that is lost


def test_nothing_is_overwritten_unasked(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "output.mp4"
    assert family.generate(path, "--seed", 1) == 0
    before = path.read_bytes()
    assert family.generate(path, "--seed", 2) == 2 and path.read_bytes() == before
    assert family.generate(path, "--seed", 2, "--overwrite") == 0 and path.read_bytes() != before
    assert sidecar(path)["seed"] == 2
