"""The commands of docs/cogvideox.md on tasks, the VAE, inversion and longer videos, run in their order with
the demo weights and fewer steps; and the examples, on as few clips as they take."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from cogvideox_diff.__main__ import main
from cogvideox_diff.config import cogvideox_demo
from tests.test_house import ROOT, as_script, code_blocks, shlex

VERBS = {"generate": 4, "invert": 4, "extend": 2, "encode": 0, "decode": 0}  # steps; 0: takes none
SECTIONS = ("## Pipelines", "## Checkpoints")  # from, up to


def documented(folder: Path) -> list[tuple[str, ...]]:
    """Our commands in the order of the document; a copy of the sections is read as a document of its own."""
    text = (ROOT / "docs" / "cogvideox.md").read_text(encoding="utf-8")
    part = folder / "part.md"
    part.write_text(text[text.index(SECTIONS[0]) : text.index(SECTIONS[1])], encoding="utf-8")
    lines = [line for block in code_blocks(part, "sh") for line in block.replace("\\\n", " ").splitlines()]
    found = [as_script(tuple(shlex.split(line))) for line in lines]
    return [words[1:] for words in found if words is not None and words[0] == "cogvideox"]


def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = documented(tmp_path)
    assert {words[0] for words in commands} == VERBS.keys()
    monkeypatch.chdir(tmp_path)
    for verb, *words in commands:
        few = ["--num_inference_steps", str(VERBS[verb])] if VERBS[verb] else []
        output = Path(words[words.index("--output_path") + 1])
        code = main([verb, *words, *few, "--quiet", "--device", "cpu"])
        assert code in (0, 5), (verb, words)  # 5: written, but so few steps show nothing
        assert output.is_file(), (verb, words)
    assert cogvideox_demo().geometry.num_frames == 17


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("video_to_video", ["--num_clips", "1", "--strength", "0.2"]),
        ("video_to_video", ["--task", "i2v", "--num_clips", "1", "--num_inference_steps", "2"]),
        ("longer_clips", ["--num_prompts", "1", "--num_clips", "2", "--num_inference_steps", "2"]),
        ("inversion", ["--num_clips", "1", "--steps", "2"]),
    ],
)
def test_examples_run(
    name: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    module.main()
    assert capsys.readouterr().out.count("\n") >= 3
