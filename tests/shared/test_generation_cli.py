"""The common half of `generate`, with a generator that costs nothing: names, files, resuming, exit codes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config_cli import FlagParser
from shared.errors import SettingError, WeightsError
from shared.generation_cli import Item, Order, add_generation_flags, read_prompt_file, run_generation
from shared.protocol import GenerationRequest, GenerationResult, StageStats
from shared.runtime import generator
from shared.self_check import check_video
from shared.verbs import interruptible
from shared.video import Video
from shared.video_io import read_video

SETTINGS = {"num_frames": 3, "fps": 8.0, "dtype": "float32", "device": "cpu"}


def noise(seed: int = 0, frames: int = 3) -> torch.Tensor:
    return torch.randint(30, 220, (frames, 16, 16, 3), generator=generator(seed, 0, "noise")).to(torch.uint8)


class Fake:
    """Noise for most prompts; some prompts fail, are black, or stand still."""

    name, tasks = "fake", frozenset({"t2v"})

    def __init__(self) -> None:
        self.made: list[tuple[str, int]] = []
        self.on_progress: Callable[[float], None] | None = None

    def generate(self, request: GenerationRequest) -> GenerationResult:
        self.made.append((request.prompt, request.seed))
        if request.prompt == "fails":
            raise SettingError("this prompt cannot be drawn")
        if request.prompt == "stops":
            os.kill(os.getpid(), signal.SIGTERM)
        if request.prompt == "odd":
            warnings.warn("an odd prompt", stacklevel=2)
        frames = noise(request.seed)
        if request.prompt == "black":
            frames = torch.zeros_like(frames)
        if request.prompt == "still":
            frames = frames[:1].expand_as(frames)
        if self.on_progress is not None:
            self.on_progress(0.5)
        stages = {"model": StageStats(seconds=0.25, peak_bytes=7, units=3, unit="steps")}
        return GenerationResult(video=Video(frames=frames, fps=8.0), stages=stages)

    def settings(self) -> dict:
        return SETTINGS


class Tool:
    """A command with `Fake` behind it; `loads` counts how often weights were read."""

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        self.fake, self.loads, self.settings = Fake(), 0, settings or SETTINGS

    def __call__(self, *argv: object) -> int:
        return interruptible(self._main, [str(word) for word in argv])

    def _main(self, argv: Sequence[str]) -> int:
        parser = FlagParser(prog="tool")
        add_generation_flags(parser, output="out/tool")
        options: argparse.Namespace = parser.parse_args(argv)
        return run_generation(
            Order(command=("tool", *argv), settings=self.settings, load=self._load), options
        )

    def _load(self) -> Fake:
        self.loads += 1
        return self.fake


@pytest.fixture
def tool() -> Tool:
    return Tool()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sidecar(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


# ---- one video


def test_a_path_with_a_suffix_is_exactly_this_file(tool: Tool, tmp_path: Path, capsys):
    path = tmp_path / "deep" / "a.mkv"
    assert tool("--prompt", " odd ", "--seed", 7, "--output_path", path) == 0
    assert names(path.parent) == ["a.json", "a.mkv"]
    assert torch.equal(read_video(path).frames, noise(7))
    printed = capsys.readouterr()
    assert printed.out == f"{path}\n" and printed.err == f"settings: {json.dumps(SETTINGS)}\n"
    known = sidecar(path)
    expected = {
        "file": "a.mkv",
        "prompt": "odd",
        "seed": 7,
        "sample": 0,
        "frames": 3,
        "fps": 8.0,
        "height": 16,
        "width": 16,
        "dtype": "float32",
        "device": "cpu",
        "seconds": 0.25,
        "stages": {"model": {"seconds": 0.25, "peak_bytes": 7, "units": 3, "unit": "steps"}},
        "warnings": ["an odd prompt"],
        "settings": SETTINGS,
        "check": {"status": "ok", "failures": [], "warnings": []},
    }
    assert expected.items() <= known.items()
    assert known["command"].startswith("tool --prompt ' odd '") and known["version"]


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".MKV"])
def test_formats(tool: Tool, tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    assert tool("--prompt", "x", "--output_path", path, "--quiet") == 0
    assert read_video(path).num_frames == 3


def test_quiet_says_only_the_path_and_json_one_object(tool: Tool, tmp_path: Path, capsys):
    assert tool("--prompt", "x", "--output_path", tmp_path / "a.mkv", "--quiet") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (f"{tmp_path / 'a.mkv'}\n", "")
    assert tool("--prompt", "x", "--output_path", tmp_path / "b.mkv", "--json") == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert printed.err == "" and said["ok"] and said["items"][0]["path"] == str(tmp_path / "b.mkv")


def test_existing_files_stay(tool: Tool, tmp_path: Path, capsys):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"mine")
    assert tool("--prompt", "x", "--output_path", path) == 2
    printed = capsys.readouterr().err
    assert "already exists" in printed and "--overwrite" in printed and printed.count("\n") == 1
    assert path.read_bytes() == b"mine" and tool.loads == 0
    assert tool("--prompt", "x", "--output_path", path, "--overwrite") == 0
    assert read_video(path).num_frames == 3
    other = tmp_path / "b.mp4"
    other.with_suffix(".json").write_text("{}")
    assert tool("--prompt", "x", "--output_path", other) == 2


def test_a_sidecar_never_vouches_for_another_video(tool: Tool, tmp_path: Path):
    """When overwriting is cut short, the old sidecar is gone."""
    path = tmp_path / "a.mkv"
    assert tool("--prompt", "x", "--output_path", path) == 0
    assert tool("--prompt", "stops", "--output_path", path, "--overwrite") == 130
    assert names(tmp_path) == ["a.json", "a.mkv"] and sidecar(path)["prompt"] == "x"


# ---- several videos


def test_a_folder_gets_a_file_for_every_sample(tool: Tool, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two\nA red circle!\n\nanother\n", encoding="utf-8")
    out = tmp_path / "out"
    assert (
        tool("--prompt_file", prompts, "--output_path", out, "--num_videos_per_prompt", 2, "--seed", 5) == 0
    )
    stems = ["000-a-red-circle-0", "000-a-red-circle-1", "001-another-0", "001-another-1"]
    assert names(out) == sorted([f"{s}.{x}" for s in stems for x in ("mp4", "json")] + ["run.json"])
    assert tool.fake.made == [("A red circle!", 5), ("A red circle!", 6), ("another", 5), ("another", 6)]
    index = json.loads((out / "run.json").read_text())
    assert [item["status"] for item in index["items"]] == ["made"] * 4


def test_a_prompt_file_resumes(tool: Tool, tmp_path: Path, capsys, monkeypatch):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("one\ntwo\n")
    arguments = ("--prompt_file", prompts, "--output_path", out, "--quiet")
    assert tool(*arguments) == 0
    (out / "001-two-0.mp4").unlink()
    before = (out / "000-one-0.mp4").stat().st_mtime_ns
    prompts.write_text("one\ntwo\nthree\n")
    assert tool(*arguments) == 0
    assert tool.fake.made == [("one", 0), ("two", 0), ("two", 0), ("three", 0)]
    assert (out / "000-one-0.mp4").stat().st_mtime_ns == before
    with monkeypatch.context() as patch:
        patch.setattr(Item, "__eq__", None)  # to compare each with each takes minutes for many
        assert tool(*arguments) == 0 and tool.loads == 2, "nothing was left to do, so nothing was loaded"
    other = Tool(SETTINGS | {"top_k": 3})
    assert other(*arguments) == 2 and "with other settings" in capsys.readouterr().err
    assert other(*arguments, "--overwrite") == 0 and len(other.fake.made) == 3


def test_a_prompt_file_has_a_prompt_a_line(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\u2028two\r\n\n# not\n three ".encode())
    assert read_prompt_file(path) == ["one\u2028two", "three"]


def test_an_interrupted_run_keeps_what_is_finished(tool: Tool, tmp_path: Path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("one\nstops\nthree\n")
    assert tool("--prompt_file", prompts, "--output_path", out, "--quiet") == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert names(out) == ["000-one-0.json", "000-one-0.mp4", "run.json"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_items_that_fail_leave_the_others_alone(tool: Tool, tmp_path: Path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("fails\none\n")
    assert tool("--prompt_file", prompts, "--output_path", out, "--quiet") == 7
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == (
        "error: 1 of 2 videos failed; first: this prompt cannot be drawn\n"
    )
    assert names(out) == ["001-one-0.json", "001-one-0.mp4", "run.json"]
    index = json.loads((out / "run.json").read_text())["items"]
    assert [(i["status"], i.get("reason")) for i in index] == [
        ("failed", "this prompt cannot be drawn"),
        ("made", None),
    ]
    assert tool("--prompt", "fails", "--output_path", tmp_path / "a.mp4") == 2


# ---- refusals before weights are read


def refusals(tmp_path: Path) -> list[tuple[tuple[object, ...], str]]:
    file, folder = tmp_path / "file", tmp_path / "folder.mp4"
    file.write_text("x")
    folder.mkdir()
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    a = ("--prompt", "x", "--output_path")
    return [
        (("--prompt", "  "), "the prompt is empty"),
        ((), "--prompt --prompt_file is required"),
        (("--prompt", "x", "--prompt_file", file), "not allowed with"),
        (("--prompt_file", tmp_path / "empty.txt"), "has no prompts"),
        (("--prompt_file", tmp_path / "absent.txt"), "cannot read prompts"),
        (("--prompt_file", tmp_path / "latin.txt"), "cannot read prompts"),
        ((*a, tmp_path / "a.avi"), "unknown video format '.avi'; legal: .mp4, .gif, .mkv"),
        ((*a, tmp_path / "b.mp4", "--num_videos_per_prompt", 2), "holds one video, 2 are asked for"),
        ((*a, tmp_path / "b.mp4", "--num_videos_per_prompt", 0), "at least 1, got 0"),
        ((*a, folder), "is a folder"),
        ((*a, file), "cannot write into"),
        ((*a, file / "deep" / "a.mp4"), "cannot write into"),
        ((*a, "/proc/a.mp4"), "cannot write into /proc"),
        (("--prompt", "x", "--seeed", 1), "(nearest: '--seed')"),
        (("--prompt", "x", "--seed", "one"), "invalid int value"),
    ]


def test_refusals_are_one_line_and_leave_nothing(tool: Tool, tmp_path: Path, capsys):
    cases = refusals(tmp_path)
    before = names(tmp_path)
    for arguments, reason in cases:
        code = exit_code(tool, *arguments)
        printed = capsys.readouterr()
        assert (code, printed.out, printed.err.count("\n")) == (2, "", 1), (arguments, printed)
        assert reason in printed.err
        assert exit_code(tool, *arguments, "--json") == 2
        printed = capsys.readouterr()
        assert json.loads(printed.out)["exit_code"] == 2 and printed.err == ""
    assert tool.loads == 0 and names(tmp_path) == before


def exit_code(tool: Tool, *arguments: object) -> object:
    try:
        return tool(*arguments)
    except SystemExit as ended:
        return ended.code


def test_weights_that_cannot_be_read_leave_nothing(tool: Tool, tmp_path: Path, capsys, monkeypatch):
    def load() -> Fake:
        raise WeightsError("keyframes.safetensors is truncated")

    monkeypatch.setattr(tool, "_load", load)
    assert tool("--prompt", "x", "--output_path", tmp_path / "out" / "a.mp4") == 3
    assert capsys.readouterr().err == "error: keyframes.safetensors is truncated\n"
    assert names(tmp_path) == []


def test_dry_run_makes_nothing(tool: Tool, tmp_path: Path, capsys):
    assert tool("--prompt", "x", "--output_path", tmp_path / "out", "--dry_run") == 0
    assert capsys.readouterr().out == f"would write {tmp_path / 'out' / '000-x-0.mp4'}\n"
    assert tool("--prompt", "x", "--output_path", tmp_path / "out", "--dry-run", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["dry_run"] and said["settings"] == SETTINGS and said["items"][0]["seed"] == 0
    assert tool.loads == 0 and names(tmp_path) == []


# ---- self-check


def test_a_black_video_is_written_flagged_and_an_error(tool: Tool, tmp_path: Path, capsys):
    path = tmp_path / "a.mp4"
    assert tool("--prompt", "black", "--output_path", path, "--quiet") == 5
    printed = capsys.readouterr()
    assert printed.err == f"error: {path} is written but failed its self-check: black\n"
    assert path.is_file()
    assert sidecar(path)["check"]["status"] == "failed" and sidecar(path)["check"]["failures"] == ["black"]


def test_a_black_video_that_is_kept_stays_an_error(tool: Tool, tmp_path: Path, capsys):
    (prompts := tmp_path / "prompts.txt").write_text("one\nblack\n")
    arguments = ("--prompt_file", prompts, "--output_path", tmp_path / "out", "--quiet")
    assert tool(*arguments) == 5
    said = capsys.readouterr().err
    assert tool(*arguments) == 5 and capsys.readouterr().err == said and len(tool.fake.made) == 2
    prompts.write_text("one\nblack\nthree\n")
    assert tool(*arguments) == 5 and len(tool.fake.made) == 3
    index = json.loads((tmp_path / "out" / "run.json").read_text())["items"]
    found = [(item["status"], item["check"]["status"]) for item in index]
    assert found == [("kept", "ok"), ("kept", "failed"), ("made", "ok")]


def test_a_still_video_is_only_flagged(tool: Tool, tmp_path: Path):
    path = tmp_path / "a.mp4"
    assert tool("--prompt", "still", "--output_path", path) == 0
    assert sidecar(path)["check"]["status"] == "warning"


def blob(ground: int, figure: tuple[int, int, int]) -> torch.Tensor:
    """A square of one colour that moves over one grey."""
    frames = torch.full((4, 16, 16, 3), ground, dtype=torch.uint8)
    for i in range(4):
        frames[i, 4:8, i : i + 4] = torch.tensor(figure, dtype=torch.uint8)
    return frames


LOOKS = [
    (noise(), "ok", ()),
    (noise(frames=1), "ok", ()),
    (torch.full((3, 8, 8, 3), 5, dtype=torch.uint8), "failed", ("black",)),
    (torch.full((3, 8, 8, 3), 250, dtype=torch.uint8), "failed", ("white",)),
    (torch.full((3, 8, 8, 3), 99, dtype=torch.uint8), "failed", ("one flat colour in every frame",)),
    ((noise() > 120).to(torch.uint8) * 255, "failed", ("saturated: every value is at an end of its range",)),
    (blob(0, (200, 30, 30)), "ok", ()),
    (blob(255, (200, 30, 30)), "ok", ()),
    (blob(128, (255, 255, 0)), "ok", ()),
]


@pytest.mark.parametrize(("frames", "status", "failures"), LOOKS)
def test_verdicts(frames: torch.Tensor, status: str, failures: tuple[str, ...]):
    verdict = check_video(Video(frames=frames, fps=8.0))
    assert (verdict.status, verdict.failures) == (status, failures)


def test_frozen_is_a_warning():
    frames = noise()[:1].repeat(4, 1, 1, 1)
    frames[2] += 2
    assert check_video(Video(frames=frames, fps=8.0)).warnings == ("frozen: all frames are the same",)
    frames[2] += 1
    assert check_video(Video(frames=frames, fps=8.0)).status == "ok"
