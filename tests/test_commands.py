"""Both command lines on tiny models with random weights; a few runs as processes of their own, since starting
one costs seconds."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cogvideo_ar.parts import save_parts
from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.config import CogVideoXConfig, cogvideox_demo
from cogvideox_diff.formats import Parts
from cogvideox_diff.text_encoder import T5TextEncoder
from cogvideox_diff.transformer import ExpertTransformer
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.config_cli import override_all
from shared.tokenizers.sentencepiece_training import T5_IDS, train_text_model
from shared.video import Video
from shared.video_io import read_video
from tests.cogvideo_ar.tiny_pipeline import SENTENCES, tiny_parts

PROMPT = "a red circle moving left"
TINY = ("transformer.num_layers=1", "sampling.num_inference_steps=2", "text.num_layers=1")


@dataclass(frozen=True)
class Command:
    """A family's console script, a folder of tiny weights, and what the family calls things."""

    package: str
    model: Path
    weights: str  # one of the model's files
    illegal_frames: str  # part of the message for 10 frames

    def main(self, *argv: object) -> int:
        """In this process; returns the exit code."""
        try:
            return importlib.import_module(f"{self.package}.__main__").main([str(word) for word in argv])
        except SystemExit as ended:
            return int(ended.code or 0)

    def generate(self, *argv: object) -> int:
        return self.main("generate", "--model_path", self.model, "--device", "cpu", *argv)

    def process(self, *argv: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", self.package, *(str(word) for word in argv)]
        return subprocess.run(words, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def cogvideo(tmp_path_factory: pytest.TempPathFactory) -> Command:
    folder = tmp_path_factory.mktemp("cogvideo")
    model = save_parts(tiny_parts(folder), folder / "model")
    return Command("cogvideo_ar", model, "keyframes.safetensors", "legal: 5, 9, 17")


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory: pytest.TempPathFactory) -> Command:
    folder = tmp_path_factory.mktemp("cogvideox")
    tokenizer = folder / "spiece.model"
    train_text_model(SENTENCES, tokenizer, vocab_size=40, ids=T5_IDS)
    pipeline = CogVideoXPipeline(tiny := tiny_cogvideox(), random_parts(tiny), tokenizer)
    return Command("cogvideox_diff", pipeline.save_pretrained(folder / "model"), "vae.safetensors", "9")


def tiny_cogvideox() -> CogVideoXConfig:
    return override_all(cogvideox_demo(), TINY)


def random_parts(config: CogVideoXConfig) -> Parts:
    torch.manual_seed(0)
    nets: list[nn.Module] = [
        ExpertTransformer(config.transformer),
        CausalVAE(config.vae),
        T5TextEncoder(config.text),
    ]
    for net in nets:
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.1)
        net.eval()
    return Parts(transformer=nets[0], vae=nets[1], text_encoder=nets[2])  # type: ignore[arg-type]


@pytest.fixture(params=["cogvideo", "cogvideox"])
def command(request: pytest.FixtureRequest) -> Command:
    return request.getfixturevalue(request.param)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sidecar(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


# ---- as processes


def test_a_process_writes_a_video_and_its_sidecar(command: Command, tmp_path: Path):
    path = tmp_path / "a.mp4"
    done = command.process(
        *("generate", "--prompt", PROMPT, "--model-path", command.model, "--output-path", path),
        *("--num_frames", 9, "--seed", 3, "--device", "cpu", "--fps", 5),
    )
    assert (done.returncode, done.stdout) == (0, f"{path}\n"), done.stderr
    assert names(tmp_path) == ["a.json", "a.mp4"]
    video, known = read_video(path), sidecar(path)
    assert (video.num_frames, video.fps) == (9, 5.0)
    assert (known["frames"], known["fps"], known["seed"], known["prompt"]) == (9, 5.0, 3, PROMPT)
    assert (known["height"], known["width"]) == (video.height, video.width)
    assert {"text", "decode"} < known["stages"].keys() and known["dtype"] == "float32"
    assert done.stderr.splitlines()[-1] == f"settings: {json.dumps(known['settings'], ensure_ascii=False)}"


def test_a_process_says_one_line_and_ends_with_the_code(cogvideo: Command, tmp_path: Path):
    model = damaged(cogvideo, tmp_path / "model")
    out = ("--output_path", tmp_path / "out" / "a.mp4", "--device", "cpu")
    done = cogvideo.process("generate", "--prompt", PROMPT, "--model_path", model, *out)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert names(tmp_path) == ["model"]


def damaged(command: Command, folder: Path) -> Path:
    """A copy of the model with one file of weights cut off."""
    shutil.copytree(command.model, folder)
    (folder / command.weights).write_bytes(b"\0" * 64)
    return folder


# ---- in this process


def test_the_same_seed_gives_the_same_file(command: Command, tmp_path: Path):
    for name in ("a", "b"):
        assert command.generate("--prompt", PROMPT, "--output_path", tmp_path / f"{name}.mkv", "--quiet") == 0
    a, b = (read_video(tmp_path / f"{name}.mkv").frames for name in "ab")
    assert torch.equal(a, b)
    assert sidecar(tmp_path / "a.mkv")["settings_hash"] == sidecar(tmp_path / "b.mkv")["settings_hash"]


def test_prompt_files_resume(command: Command, tmp_path: Path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text(f"{PROMPT}\n")
    arguments = ("--prompt_file", prompts, "--output_path", out, "--quiet", "--num_frames", 9)
    assert command.generate(*arguments) == 0
    first = (out / "000-a-red-circle-moving-left-0.mp4").stat().st_mtime_ns
    prompts.write_text(f"{PROMPT}\na blue square\n")
    assert command.generate(*arguments) == 0
    assert (out / "000-a-red-circle-moving-left-0.mp4").stat().st_mtime_ns == first
    assert len(names(out)) == 5
    assert command.generate(*arguments[:-1], 17) == 2, "the files are there with other settings"


def errors(command: Command, tmp_path: Path) -> list[tuple[tuple[object, ...], int, str]]:
    (tmp_path / "there.mp4").write_bytes(b"mine")
    model = damaged(command, tmp_path / "model")
    x = ("--prompt", PROMPT, "--output_path", tmp_path / "new" / "a.mp4")
    return [
        (("--prompt", " "), 2, "the prompt is empty"),
        ((*x, "--num_frames", 10), 2, command.illegal_frames),
        ((*x, "--height", 31), 2, "height"),
        ((*x, "--fps", 0), 2, "fps must be positive, got 0"),
        ((*x, "--dtype", "float8"), 2, "unknown dtype 'float8'"),
        ((*x, "--device", "tpu"), 2, "unknown device 'tpu'"),
        ((*x, "--set", "no_such=1"), 2, "no field 'no_such' in SamplingConfig"),
        ((*x, "--num_frame", 9), 2, "(nearest: '--num_frames')"),
        ((*x, "--model_path", tmp_path / "nowhere"), 3, "nowhere"),
        ((*x, "--model_path", tmp_path), 3, "config.json"),
        ((*x, "--model_path", model), 3, command.weights),
        (("--prompt", PROMPT, "--output_path", tmp_path / "there.mp4"), 2, "already exists"),
        (("--prompt", PROMPT, "--output_path", tmp_path / "there.mp4" / "a.mp4"), 2, "cannot write into"),
    ]


def test_errors_are_one_line_and_leave_nothing(command: Command, tmp_path: Path, capsys):
    cases = errors(command, tmp_path)
    check_errors(command.generate, cases, capsys)
    assert names(tmp_path) == ["model", "there.mp4"] and (tmp_path / "there.mp4").read_bytes() == b"mine"


def check_errors(run: Callable[..., int], cases: list[tuple[tuple[object, ...], int, str]], capsys) -> None:
    for arguments, code, reason in cases:
        got = run(*arguments)
        printed = capsys.readouterr()
        assert (got, printed.out, printed.err.count("\n")) == (code, "", 1), (arguments, got, printed)
        assert reason in printed.err
        assert run(*arguments, "--json") == code
        said = json.loads(capsys.readouterr().out)
        assert (said["ok"], said["exit_code"]) == (False, code)


def test_training_refuses_unknown_names(command: Command, tmp_path: Path, capsys):
    out = ("--output_path", tmp_path / "run")
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("--preset", "dmo", *out), 2, "unknown preset 'dmo' (nearest: 'demo'); legal: demo"),
        (("--stage", "vea", *out), 2, "unknown stage 'vea'"),
        (("--stage", "tokenizers", *out), 2, "(nearest: 'tokenizer'); legal: tokenizer, "),
        (("--steps", 0, *out), 2, "steps must be at least 1"),
        (("--set", "vocab=1", *out), 2, "no field 'vocab' in Recipe (nearest: 'vocab_size')"),
        (("--stage", "export", *out), 3, "is missing: run the stage"),
        (("--preset", "demo"), 2, "--output_path"),
    ]
    check_errors(lambda *argv: command.main("train", *argv), cases, capsys)
    assert names(tmp_path) == []


def test_training_runs_a_stage(command: Command, tmp_path: Path, capsys):
    assert command.main("train", "--stage", "tokenizer", "--output_path", tmp_path, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"ok": True, "exit_code": 0, "stages": ["tokenizer"], "folder": str(tmp_path)}
    assert names(tmp_path)


# ---- what only one family has


def test_key_frames_alone(cogvideo: Command, tmp_path: Path, capsys):
    path = tmp_path / "a.mp4"
    flags = ("--temperature", 0.5, "--top_k", 3, "--coglm_temperature2", 0.9, "--guidance_scale", 1)
    flags += ("--set", "max_batch=2", "first_frame.top_k=5")
    assert cogvideo.generate("--prompt", PROMPT, "--output_path", path, "--stages", 1, *flags) == 0
    known = sidecar(path)
    assert known["frames"] == 5 and known["stages"].keys().isdisjoint({"model/interpolation"})
    sampling = known["settings"]["sampling"]
    assert sampling["default"] == {"temperature": 0.5, "top_k": 3, "temperature2": 0.9}
    assert (sampling["guidance_alpha"], sampling["max_batch"], sampling["first_frame"]["top_k"]) == (
        1.0,
        2,
        5,
    )
    capsys.readouterr()
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("--prompt", PROMPT, "--duration", 3), 2, "legal: 2.0, 1.0, 0.5"),
        (("--prompt", PROMPT, "--stages", 1, "--rounds", 1), 2, "--rounds asks for 1"),
        (("--prompt", PROMPT, "--top_k", 0), 2, "top_k must be >= 1"),
    ]
    check_errors(cogvideo.generate, cases, capsys)


def test_video_to_video(cogvideox: Command, tmp_path: Path, capsys):
    given = tmp_path / "given.mkv"
    frames = torch.randint(256, (9, 64, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    Video(frames=frames, fps=4.0).save(given)
    path = tmp_path / "a.mp4"
    flags = ("--image_or_video_path", given, "--strength", 0.5, "--guidance_scale", 1, "--scheduler", "dpm")
    assert cogvideox.generate("--prompt", PROMPT, "--output_path", path, *flags) == 0
    known = sidecar(path)
    assert (known["frames"], known["settings"]["task"], known["settings"]["strength"]) == (9, "v2v", 0.5)
    assert known["stages"]["model"]["units"] == 1 and len(known["inputs"]["frames_sha256"]) == 16
    capsys.readouterr()
    x = ("--prompt", PROMPT, "--output_path", tmp_path / "b.mp4")
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((*x, "--generate_type", "i2v"), 2, "needs --image_or_video_path"),
        ((*x, "--generate_type", "t2v", "--image_or_video_path", given), 2, "takes no --image_or_video_path"),
        ((*x, "--image_or_video_path", tmp_path / "no.mp4"), 2, "cannot read the video"),
        ((*x, "--image_or_video_path", tmp_path / "no.png"), 2, "cannot read the image"),
        ((*x, "--scheduler", "ddmi"), 2, "nearest: ddim"),
        ((*x, "--num_inference_steps", 0), 2, "num_inference_steps"),
        ((*x, "--strength", 0.5), 2, "no video was given"),
    ]
    check_errors(cogvideox.generate, cases, capsys)
