"""Every command in README, CONTRIBUTING and docs is executed: here, in the order of its document, with tiny
models and few steps; or by the test that ELSEWHERE names."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import pytest

from benchmarks import registry
from benchmarks.peers import rows
from tests.benchmarks.fakes import FakeGenerator
from tests.cogvideo_ar.released_parts import write_released
from tests.fuzz.world import write_models
from tests.shared.chat_server import ChatServer
from tests.shared.clip_files import noise_video
from tests.shared.clip_files import world as write_clips
from tests.test_house import DOCUMENTS, ROOT, SCRIPTS, as_script

Words = tuple[str, ...]
STARTS = (
    *(f"{script} " for script in SCRIPTS),
    "python",
    "torchrun",
    "make ",
    "rm ",
    "source ",
    "PARITY_FIGURES",
    ".venv/bin/",
)
ENDS = (0, 5)  # 5: written, but nets with random weights show nothing
HERE = "tests/test_documents.py::test_commands"

# What begins so is executed by that test.
ELSEWHERE = {
    "make": ".ci/run",
    ".venv/bin/pip install pre-commit": ".ci/run",
    ".venv/bin/pre-commit install": ".ci/run",
    "source .venv/bin/activate": ".ci/run",
    "rm -f": "tests/test_documents.py::test_what_is_executed_elsewhere",
    "python -m pytest": ".ci/run",
    "python -m tests.figures": "tests/figures.py",
    "torchrun --nproc-per-node 2 -m cogvideox_diff generate": "tests/distributed/test_parallel_pipeline.py",
    "torchrun --nproc-per-node 4 -m cogvideox_diff generate": "tests/distributed/test_parallel_pipeline.py",
    "torchrun --nproc-per-node 2 -m cogvideox_diff train": "tests/distributed/test_training_torchrun.py",
    "torchrun --nproc-per-node 4 -m cogvideo_ar train": "tests/distributed/test_training_torchrun.py",
    "torchrun --nproc-per-node 2 -m cogvideox_diff finetune": "tests/distributed/test_finetune_torchrun.py",
    "torchrun --nproc-per-node 2 -m cogvideo_ar finetune": "tests/distributed/test_finetune_torchrun.py",
    **{
        f"cogvideox {verb} --": "tests/cogvideox_diff/test_documented_commands.py::test_every_command_runs"
        for verb in ("encode", "decode", "invert", "extend")
    },
    "cogvideox generate --prompt 'a green circle moving left' --latents_path": (
        "tests/cogvideox_diff/test_documented_commands.py::test_every_command_runs"
    ),
    "cogvideo-data caption --input_path clips --output_path captioned --adapter transformers": (
        "tests/shared/test_captioning_transformers.py"
    ),
    "cogvideo-ar generate --prompt 'a red circle moving left' --quantize": (
        "tests/cogvideo_ar/test_quantize.py"
    ),
    # an hour of training (its number of steps is named), and the model that came of it
    "cogvideox train --preset demo --stage all --set transformer.steps=3787": (
        "tests/cogvideox_diff/test_recipe_options.py"
    ),
    "cogvideo-bench run docs/examples/equal_compute": "tests/benchmarks/test_cli.py",
    "cogvideo-bench report out/equal-compute": "tests/benchmarks/test_report.py",
    "cogvideo-bench report out/heldout --feature_files": "tests/benchmarks/test_metrics_nets.py",
}
# What the commands of a program and verb get in addition, so that they end soon.
SHORT = {
    "cogvideo-ar generate": "--num_frames 5 --quiet --device cpu --overwrite",
    "cogvideo-ar finetune": "--steps 1 --batch 1 --quiet",
    "cogvideo-ar train": "--steps 1 --set num_clips=8 num_stills=8 image_batch=2 clip_batch=2 --quiet",
    "cogvideo-ar precompute": "--quiet",
    "cogvideo-ar convert": "--quiet --overwrite",
    "cogvideo-ar clusters": "--num_clusters 4 --quiet --overwrite",
    "cogvideox generate": "--num_inference_steps 2 --quiet --device cpu --overwrite",
    "cogvideox finetune": "--steps 1 --batch 1 --rank 2 --quiet",
    "cogvideox train": "--steps 1 --set num_clips=8 num_stills=8 clip_batch=2 still_batch=2 --quiet",
    "cogvideox precompute": "--sizes 9x64x64 --quiet",
    "cogvideox convert": "--quiet",
    "cogvideo-bench run": "--num_prompts 2 --num_clips 1 --quiet",
    "cogvideo-data caption": "--quiet --overwrite",
    "cogvideo-data check": "--quiet",
    "cogvideo-data filter": "--quiet --overwrite",
    "cogvideo-data upsample": "--quiet --overwrite",
}
OWN_MODEL = {"cogvideox": "CogVideoX-2b"}  # instead of the demo weights
NO_MODEL = ("plan", "train", "doctor", "lora")


def commands(path: Path) -> Iterator[Words]:
    """The lines of all fenced blocks that begin as a command does, without comments, brackets of usage and
    variables; in their order."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|sh|shell|console)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for line in (line for block in blocks for line in block.replace("\\\n", " ").splitlines()):
        line = line.removeprefix("$ ")
        if line.startswith(STARTS) or re.match(r"[A-Z_]+=\S+ \w", line):
            for part in re.split(r"\s&&\s", re.sub(r"[\[\]]", "", line)):
                words = shlex.split(part, comments=True)
                yield tuple(words[next(i for i, w in enumerate(words) if not re.match(r"[A-Z_]+=", w)) :])


def elsewhere(words: Words) -> str:
    """The test that executes it, "" if that is to be done here."""
    said = shlex.join(words)
    return next((test for start, test in ELSEWHERE.items() if said.startswith(start)), "")


FOUND = {path.name: [(w, elsewhere(w)) for w in commands(path)] for path in DOCUMENTS}


@pytest.mark.parametrize("name", [name for name, found in FOUND.items() if found])
def test_what_is_executed_elsewhere(name: str) -> None:
    """The test is there, or a test that names the example."""
    tests = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    for words, where in FOUND[name]:
        file, _, function = where.partition("::")
        if file:
            assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8") or not function, words
        elif as_script(words) is None:
            assert words[0].startswith("python") and words[1].startswith("examples/"), (name, words)
            stem = Path(words[1]).parent.name if Path(words[1]).stem == "run" else Path(words[1]).stem
            assert (ROOT / words[1]).is_file()
            assert any(stem in text for path, text in tests.items() if path != Path(__file__)), words


# ---- here


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents' users have: models, clips, pictures and lists."""
    folder = tmp_path_factory.mktemp("documents")
    write_models(folder)
    for old, new in (("ar", "cogvideo"), ("diffusers", "CogVideoX-2b")):
        (folder / old).rename(folder / new)
    write_released(folder / "FOLDER")
    write_clips(folder / "clips", 2)
    iio.imwrite(folder / "first.png", noise_video(1, 16, 32).frames[0].numpy())
    (folder / "prompts.txt").write_text("a red circle moving left\n", encoding="utf-8")
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name", [name for name, found in FOUND.items() if any(as_script(w) and not where for w, where in found)]
)
def test_commands(
    name: str,
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for path in material.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "build", lambda name: FakeGenerator(name))
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    with ChatServer({}).running() as server:
        for words, where in FOUND[name]:
            script = as_script(words)
            if script is None or where:
                continue
            given = shortened(script, server.base_url)
            code = call(given)
            said = capfd.readouterr().err[-1500:]
            assert code in ENDS, (words, given, code, said)


def call(words: Words) -> int:
    module, _, main = SCRIPTS[words[0]].partition(":")
    try:
        return getattr(importlib.import_module(module), main)(list(words[1:]))
    except SystemExit as ended:
        return int(ended.code or 0)


def shortened(words: Words, base_url: str) -> list[str]:
    """The command on what is there: tiny models for those that it names, few steps, a local server."""
    program, verb = words[:2]
    known = {"http://localhost:8000/v1": base_url}
    known["PATH"] = "lora.safetensors" if program == "cogvideox" else "demo"
    known |= {"demo": OWN_MODEL.get(program, "demo")} if verb not in NO_MODEL else {}
    if verb == "doctor":
        known["MODEL"] = "CogVideoX-2b"
    more = SHORT.get(f"{program} {verb}", "").split()
    if program in OWN_MODEL and verb not in NO_MODEL and "--model_path" not in words:
        more += ["--model_path", OWN_MODEL[program]]
    return [*(known.get(word, word) if i > 1 else word for i, word in enumerate(words)), *more]
