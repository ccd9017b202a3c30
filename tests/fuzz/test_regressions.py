"""What the fuzzers of this folder found, one test for each kind, so that it stays mended."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.torch import save_file

from benchmarks.human_study import make_study
from benchmarks.imports import read_whole
from benchmarks.storage import RunFolder
from benchmarks.suites import suite_from
from benchmarks.windows import Window
from cogvideo_ar.clusters import read_clusters
from cogvideo_ar.config import cogvideo_demo
from cogvideox_diff.config import CogVideoXConfig, cogvideox_demo
from cogvideox_diff.latent_files import read_latents, write_latents
from shared.checkpoints import open_safetensors
from shared.clips import shapes
from shared.clips.dataset import probe
from shared.clips.measures import FORMAT, measure, read_scores
from shared.clips.precompute import read_index
from shared.config_cli import override, report
from shared.config_io import check_type, from_plain, load_config, to_plain
from shared.errors import OutputPathError, SettingError, UserError, WeightsError
from shared.files import write_json
from shared.json_files import encodable, parse_json, read_object, shaped
from shared.model_folder import without_memory
from shared.runtime import parse_dtype
from shared.tokenizers.base import whole_characters
from shared.tokenizers.icetk import IceTokenizer
from shared.tokenizers.t5 import T5Tokenizer
from shared.training_state import newest
from shared.verbs import Program
from shared.video_io import read_video
from tests.fuzz.harness import called
from tests.fuzz.world import World, programs, tiny_config

# ---- JSON


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "9" * 5000, "{", "", b"\xff"])
def test_texts_that_are_no_json(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for kind in (SettingError, WeightsError):
        with pytest.raises(kind, match="cannot read"):
            read_object(tmp_path / "a.json", kind)


@pytest.mark.parametrize("text", ["[]", "null", "7", '"a"'])
def test_values_that_are_no_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SettingError, match="not an object"):
        read_object(tmp_path / "a.json", SettingError)


def test_deep_json_in_a_models_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"config":' * 10**5)
    with pytest.raises(WeightsError, match="nested too deeply"):
        load_config(CogVideoXConfig, tmp_path / "config.json")


def test_halves_of_characters_can_be_written(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"prompt": "a\udcffb\ud800", "emoji": "🙂"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": "a\udcffb\ud800", "emoji": "🙂"}
    assert encodable("中文 🙂") == "中文 🙂"


def test_reasons_hold_nothing_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(SettingError("no \x1b[2J\udcff 中文\nx")) == 2
    assert capsys.readouterr().err == "error: no \\x1b[2J\\udcff 中文 x\n"
    report(SettingError("\udcff"), as_json=True)
    assert json.loads(capsys.readouterr().out)["reason"] == "\\udcff"


LEGAL: list[tuple[Any, Any]] = [
    (int, 3), (float, 3), (float, 0.5), (bool, True), (str, ""), (int | None, None), (Literal["a", 1], 1),
    (tuple[int, int], (1, 2)), (tuple[int, ...], ()), (str | tuple[str, ...], ("a",)), (dict[str, str], {}),
]  # fmt: skip
ILLEGAL: list[tuple[Any, Any]] = [
    (int, True), (int, 1.0), (int, "1"), (int, 2**63), (float, float("nan")), (float, float("inf")),
    (float, None), (float, 10**400), (bool, 1), (str, None), (str, ["a"]), (int | None, "x"),
    (Literal["a", 1], True),
    (Literal["a"], ["a"]), (tuple[int, int], [1, 2]), (tuple[int, int], (1,)), (tuple[str, ...], (1,)),
]  # fmt: skip


def test_types() -> None:
    for hint, value in LEGAL:
        check_type(hint, value, "x")
    for hint, value in ILLEGAL:
        with pytest.raises(ValueError):
            check_type(hint, value, "x")


HOSTILE = (None, True, "x", [], {}, -1, 2**70, 1e308, float("nan"), [[1]], "\ud800")


def changed(plain: Any, path: Sequence[str], value: Any) -> Any:
    head, *rest = path
    return plain | {head: changed(plain[head], rest, value) if rest else value}


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_every_setting_of_a_model_with_other_values(value: Any) -> None:
    """Whatever stands in a config.json: a config, or a WeightsError."""
    for config in (cogvideo_demo(), cogvideox_demo()):
        plain = to_plain(config)
        for part, settings in plain.items():
            for name in settings or ():
                try:
                    made = from_plain(type(config), changed(plain, (part, name), value))
                except WeightsError:
                    continue
                assert to_plain(made) != plain or settings[name] == value


@pytest.mark.parametrize("layers", [1001, 10**9])
def test_a_damaged_number_of_layers_is_not_built(layers: int) -> None:
    for config, part in (
        (cogvideo_demo(), "keyframes"),
        (cogvideox_demo(), "transformer"),
        (cogvideox_demo(), "text"),
    ):
        with pytest.raises(WeightsError, match="num_layers"):
            from_plain(type(config), changed(to_plain(config), (part, "num_layers"), layers))


def test_a_net_that_cannot_be_counted() -> None:
    from cogvideox_diff.vae.autoencoder import CausalVAE

    with pytest.raises(WeightsError, match="do not describe a net"), without_memory():
        CausalVAE(replace(tiny_config().vae, latent_channels=2**62))


@pytest.mark.parametrize("text", ["1" + "0" * 400, "-9223372036854775809", "1" * 5000, "inf", "nan"])
def test_overrides_that_nothing_can_hold(text: str) -> None:
    with pytest.raises(SettingError, match="a whole number"):
        override(tiny_config(), f"sampling.num_inference_steps={text}")


def test_a_dtype_that_is_no_text() -> None:
    with pytest.raises(SettingError, match="unknown dtype"):
        parse_dtype([["float32"]])  # type: ignore[arg-type]


WINDOW = ("seconds", "fps", "height", "width")
SUITE: dict[str, Any] = {"name": "a", "models": ["m"], "prompts": ["p"], "num_prompts": 1}
SUITES: list[dict[str, Any]] = [
    *({"num_prompts": value} for value in ("1", 1.5, None, True, 10**30)),
    *({"models": value} for value in ([], [1], None, "m", {"a": 1}, [["m"]], ["m", "m"])),
    *({"window": value} for value in (3, [1], {"seconds": 1}, dict.fromkeys(WINDOW, "1"))),
    *({"translations": value} for value in (3, [1], {"zh": "a"}, {"zh": [1]}, {"zh": []}, None)),
    *({"languages": value} for value in (3, {"m": 3}, {"m": ["zh"]}, {"m": None})),
    *({"prompts": value} for value in ([1], None, {}, "nowhere", [])),
    {"num_videos_per_prompt": 2**31}, {"num_clips": 10**9},
    {"num_prompts": 1000, "prompts": "train", "num_videos_per_prompt": 1000},
]  # fmt: skip


@pytest.mark.parametrize("changes", SUITES, ids=repr)
def test_suites_with_other_values(changes: dict[str, Any]) -> None:
    suite_from(SUITE)
    with pytest.raises(SettingError):
        suite_from(SUITE | changes)


@pytest.mark.parametrize("text", ["inf,1,1,1", "1e9,1e9,1,1", "nan,1,1,1", "1,1,9999999999,1"])
def test_windows_without_end(text: str) -> None:
    with pytest.raises(SettingError):
        Window.parse(text)


# ---- other files


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'shape': (", b"PK\x03\x04"]
)
def test_tables_of_clusters(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(WeightsError):
        read_clusters(tmp_path / "a.npy", 32)
    np.save(tmp_path / "a.npy", np.arange(32))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(b"(32,)", b"(2**99,)").replace(b"  \n", b"\n", 1))
    with pytest.raises(WeightsError):
        read_clusters(tmp_path / "a.npy", 32)


def test_latents_that_say_nonsense(world: World, tmp_path: Path) -> None:
    good = read_latents(world / "latents.safetensors")
    for changes in (
        {"fps": -1},
        {"height": "64"},
        {"kind": "loud"},
        {"settings": [1]},
        {"scaling_factor": 0},
    ):
        with pytest.raises(ValueError):
            replace(good, **changes)
    file = write_latents(tmp_path / "a.safetensors", good)
    from shared.checkpoints import load_metadata

    told = load_metadata(file)
    for text in ("[" * 10**5, "{", '"x"', "null"):
        save_file({"latents": good.latents}, file, told | {"fps": text})
        with pytest.raises(SettingError, match="does not say"):
            read_latents(file)


def test_lines_of_measures_that_are_wrong_do_not_count(world: World, tmp_path: Path) -> None:
    lines = (world / "clips/scores.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[0])
    assert row["format"] == FORMAT
    wrong = [
        row | {name: value}
        for name in row
        for value in (None, [], "x\ud800", {"a": 1})
        if name not in ("key", "format")
    ]
    wrong = [w for w in wrong if not (w["problem"] == "x\ud800" or w["cuts"] == [])]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, [*wrong, row | {"key": [1], "more": 2}])))
    assert read_scores(tmp_path / "s.jsonl") == {}
    (tmp_path / "s.jsonl").write_text("[" * 10**5 + "\n" + "\n".join(lines))
    assert len(read_scores(tmp_path / "s.jsonl")) == 2


def test_indices_of_what_was_precomputed(world: World, tmp_path: Path) -> None:
    content = read_object(world / "tokens/index.json", SettingError)
    for changes in (
        {"clips": 3},
        {"clips": [3]},
        {"shards": {"a": 3}},
        {"shards": {"a": [3]}},
        {"settings": None},
    ):
        write_json(tmp_path / "index.json", content | changes)
        with pytest.raises(SettingError):
            read_index(tmp_path, content["kind"])


@pytest.mark.parametrize("fps", ["NaN", "Infinity", "0", "-8", "[]", "null", "1e999"])
def test_rates_of_a_folder_of_frames(fps: str, world: World, tmp_path: Path) -> None:
    shutil.copytree(world / "frames", tmp_path / "frames")
    (tmp_path / "frames/video.json").write_text(f'{{"fps": {fps}}}')
    with pytest.raises(UserError, match="frame rate"):
        read_video(tmp_path / "frames")


@pytest.mark.parametrize(
    ("name", "old", "new"), [("film.mp4", b"avc1", b"xxxx"), ("film.mkv", b"FFV1", b"\xba\xbbV1")]
)
def test_films_of_an_unknown_kind(name: str, old: bytes, new: bytes, world: World, tmp_path: Path) -> None:
    data = (world / name).read_bytes()
    assert old in data
    (tmp_path / name).write_bytes(data.replace(old, new))
    for reader in (read_video, probe, read_whole):
        with pytest.raises(UserError):
            reader(tmp_path / name)
    assert measure(tmp_path / name).problem


def test_films_with_labels_that_are_no_text(world: World, tmp_path: Path) -> None:
    data = (world / "film.mkv").read_bytes()
    assert b"DURATION" in data
    (tmp_path / "a.mkv").write_bytes(data.replace(b"DURATION", b"\xbaURATION"))
    for reader in (read_video, read_whole):
        assert reader(tmp_path / "a.mkv").num_frames == 9


def test_headers_are_checked_wherever_a_file_is_opened(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "more": 1}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(WeightsError):
        open_safetensors(tmp_path / "a.safetensors")


def test_states_of_training_pass_the_container_check(tmp_path: Path) -> None:
    import torch

    torch.save({"step": 1, "model": Path("x")}, tmp_path / "state.pt")
    with pytest.raises(WeightsError, match="refused"):
        newest(tmp_path)


def test_no_reader_goes_around_the_check(root: Path) -> None:
    """`load_file` and `safe_open` of safetensors are called in one place."""
    packages = ("shared", "cogvideo_ar", "cogvideox_diff", "benchmarks")
    files = [path for package in packages for path in (root / package).rglob("*.py")]
    calls = re.compile(r"\b(load_file|safe_open)\(")
    found = {path.name for path in files if calls.search(path.read_text(encoding="utf-8"))}
    assert found == {"checkpoints.py"}


# ---- runs of the benchmark


def test_files_of_another_form() -> None:
    for error in (KeyError("a"), TypeError("b"), IndexError("c"), ZeroDivisionError("d")):
        with pytest.raises(SettingError, match="does not hold"), shaped("it", SettingError):
            raise error
    with pytest.raises(RuntimeError), shaped("it", SettingError):
        raise RuntimeError


def test_runs_without_an_index(tmp_path: Path) -> None:
    for content in ({}, {"suite": 3, "models": {}}, {"suite": {}}):
        write_json(tmp_path / "run.json", content)
        with pytest.raises(SettingError, match="not the index of a run"):
            RunFolder(path=tmp_path).read_index()


def test_more_raters_than_there_are(world: World, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="raters"):
        make_study(RunFolder(path=world / "run"), tmp_path, raters=2**31)


# ---- text


def test_halves_of_characters_in_prompts(world: World) -> None:
    assert whole_characters("a\udcff\ud83d\ude42") == "a\ufffd🙂"
    tokenizer = T5Tokenizer(world / "diff/tokenizer", text_len=16)
    assert tokenizer.encode("a \udcff") == tokenizer.encode("a \ufffd")
    other = IceTokenizer(world / "ar/ice_text.model")
    text = "͙\U000f35bc\U000fd118\x83\udeb6ً\x92\x86"
    assert other.encode(text) == other.encode(text.replace("\udeb6", "\ufffd")) and other.tokenize(text)


def test_a_long_word_is_parsed_in_no_time() -> None:
    assert shapes.parse("if" * 100_000 + " gray background") == {"background": "gray"}


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "mine", tmp_path / "mine/..", Path("."), tmp_path / "pipe", Path("/")):
        with pytest.raises(OutputPathError):
            write_json(path, {"a": 1})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "pipe", "thesis.txt"]
    assert (tmp_path / "pipe").is_fifo()


CHECK = ["check", "--input_path", "$/clips"]
LOSSES = {
    "scores": ("cogvideo-data", [*CHECK, "--report", "r.json", "--scores", "film.mp4"]),
    "report": ("cogvideo-data", [*CHECK, "--report", "film.mp4", "--scores", "s.jsonl"]),
    "compare": ("cogvideo-bench", ["compare", "$/run", "$/run", "--output_path", "film.mp4"]),
    "page": ("cogvideo-bench", ["peers", "--page", "film.mp4"]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_films_are_not_written_over_by_lists(name: str, world: World, tmp_path: Path) -> None:
    shutil.copyfile(world / "film.mp4", tmp_path / "film.mp4")
    program, words = LOSSES[name]
    code, _ = end_of(programs()[program], [word.replace("$", str(world.path)) for word in words], tmp_path)
    assert code == 2 and (tmp_path / "film.mp4").read_bytes() == (world / "film.mp4").read_bytes()


@pytest.mark.parametrize("flag", ["--refinement_path", "--super_resolution_path"])
def test_parts_of_a_model_that_has_none(flag: str, world: World, tmp_path: Path) -> None:
    argv = ["generate", "--model_path", world / "ar", "--prompt", "a", "--dry_run", flag, world / "ar"]
    code, said = end_of(programs()["cogvideo-ar"], argv, tmp_path)
    assert code in (2, 3) and said.startswith("error: ")


def test_links_to_themselves(world: World, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    argv = [
        "caption",
        "--input_path",
        world / "clips",
        "--output_path",
        tmp_path / "loop",
        "--adapter",
        "shapes",
    ]
    code, said = end_of(programs()["cogvideo-data"], argv, tmp_path)
    assert code == 2 and said.startswith("error: ")


@pytest.mark.parametrize("flag", ["--num_pairs=--", "--pairs=--", "--seed=--"])
def test_flags_with_nothing(flag: str, world: World, tmp_path: Path) -> None:
    argv = ["study", "make", world / "run", "--output_path", "s", flag]
    code, said = end_of(programs()["cogvideo-bench"], argv, tmp_path)
    assert code == 2 and "needs a value" in said


def end_of(program: Program, argv: Sequence[object], folder: Path) -> tuple[int | None, str]:
    done = called(program, [str(word) for word in argv], folder)
    assert done.error is None
    return done.code, done.err


def test_more_videos_than_anybody_waits_for(world: World, tmp_path: Path) -> None:
    for name, model in (("cogvideo-ar", "ar"), ("cogvideox", "diff")):
        argv = ["generate", "--model_path", world / model, "--prompt", "a", "--num_videos_per_prompt", 2**62]
        code, said = end_of(programs()[name], argv, tmp_path)
        assert code == 2 and "at most 100000 in one call" in said


HUGE = {
    ("cogvideo-ar", "clusters"): ["--model_path", "$/ar", "--output_path", "c.npy", "--seed", "1" + "0" * 40],
    ("cogvideox", "plan"): ["--model_path", "$/diff", "--memory", "inf"],
    ("cogvideo-data", "caption"): ["--input_path", "$/clips", "--output_path", "o", "--adapter", "shapes",
                                   "--every", "1e-320"],
    ("cogvideo-ar", "precompute"): ["--model_path", "$/ar", "--input_path", "$/clips", "--output_path", "o",
                                    "--rates", "8", "nan"],
    ("cogvideo-bench", "study"): ["make", "$/run", "--output_path", "s", "--seed", "-1"],
    ("cogvideox", "finetune"): ["--model_path", "$/diff", "--data", "$/clips", "--output_path", "o",
                                "--seed", str(2**40)],
}  # fmt: skip


@pytest.mark.parametrize("flag", ["--height", "--width", "--num_frames"])
def test_sizes_that_no_tensor_has(flag: str, world: World, tmp_path: Path) -> None:
    model, size = ["--model_path", world / "diff"], [flag, 2**40]
    for argv in (
        ["encode", *model, "--input_path", world / "film.mkv", "--output_path", "l.safetensors", *size],
        ["generate", *model, "--prompt", "a", "--output_path", "o.mp4", *size],
    ):
        code, said = end_of(programs()["cogvideox"], argv, tmp_path)
        assert code == 2 and said.startswith("error: ")


@pytest.mark.parametrize("call", HUGE, ids=" ".join)
def test_numbers_that_nothing_can_hold(call: tuple[str, str], world: World, tmp_path: Path) -> None:
    argv = [word.replace("$", str(world.path)) for word in HUGE[call]]
    code, said = end_of(programs()[call[0]], [call[1], *argv], tmp_path)
    assert code == 2 and said.count("\n") == 1 and len(said) < 400


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e300"])
def test_pages_of_any_size(value: str, world: World, tmp_path: Path) -> None:
    code, said = end_of(programs()["cogvideo-bench"], ["report", world / "run", "--page_mb", value], tmp_path)
    assert code == 2 and "page_mb" in said


def test_bytes_of_a_command_line_that_are_no_text(world: World, tmp_path: Path) -> None:
    argv = ["report", world / "empty_folder", "--json", "\udcff.mp4", "--feature_files", "x=1"]
    done = called(programs()["cogvideo-bench"], [str(word) for word in argv], tmp_path)
    assert (done.code, done.error) == (2, None) and json.loads(done.out)["ok"] is False


@pytest.mark.parametrize("workers", ["-1", "257", "1000000000"])
def test_more_workers_than_machines_have(workers: str, world: World, tmp_path: Path) -> None:
    given = ["--input_path", world / "clips", "--num_workers", workers]
    calls = {
        "cogvideo-data": ["check", *given, "--report", "r.json", "--scores", "s.jsonl"],
        "cogvideo-ar": ["precompute", "--model_path", world / "ar", *given, "--output_path", "o"],
    }
    for name, argv in calls.items():
        code, said = end_of(programs()[name], argv, tmp_path)
        assert code == 2 and "num_workers must be 0 to 256" in said
