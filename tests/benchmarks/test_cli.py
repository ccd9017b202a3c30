"""The command line: verbs, exit codes, both spellings of flags."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import registry
from benchmarks.__main__ import main
from benchmarks.commands.run import add_arguments, requested_suite
from benchmarks.suites import Suite, load_suite, suite_names
from benchmarks.windows import Window
from shared.errors import SettingError
from tests.benchmarks.fakes import FakeGenerator


@pytest.fixture
def fake_models(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeGenerator]:
    models = {name: FakeGenerator(name) for name in registry.PRESETS}
    monkeypatch.setattr(registry, "build", models.__getitem__)
    return models


def run_small(folder: Path, *more: str) -> int:
    return main(
        [
            "run",
            "demo",
            "--output_path",
            str(folder),
            "--num-prompts",
            "2",
            "--num_clips",
            "1",
            "--quiet",
            *more,
        ]
    )


def test_run_twice_then_report_and_compare(
    tmp_path: Path, fake_models: dict[str, FakeGenerator], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_small(run) == 0
    assert "6 items made" in capsys.readouterr().out
    page = run / "report.html"
    written = page.stat().st_mtime_ns
    assert run_small(run) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert page.stat().st_mtime_ns == written
    assert main(["report", str(run)]) == 0
    capsys.readouterr()
    assert main(["compare", str(run), str(run), "--json"]) == 0
    differences = json.loads(capsys.readouterr().out)["differences"]
    assert {entry["value"] for entry in differences} == {0.0}


def test_failed_items_end_with_their_code(
    tmp_path: Path, fake_models: dict[str, FakeGenerator], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_models["cogvideo-demo"].fail_on = (1,)
    assert run_small(tmp_path / "run", "--json") == 7
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == 7 and "1 items failed" in answer["reason"]
    assert (tmp_path / "run" / "report.html").is_file()


def test_prompts_of_ones_own(tmp_path: Path, fake_models: dict[str, FakeGenerator]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\na red circle\n\na blue square moving up slowly\n", encoding="utf-8")
    folder = tmp_path / "run"
    words = [
        "run",
        "demo",
        "--prompt-file",
        str(file),
        "--output-path",
        str(folder),
        "--num_clips=0",
        "--quiet",
    ]
    assert main(words) == 0
    suite = json.loads((folder / "run.json").read_text(encoding="utf-8"))["suite"]
    assert (
        suite["prompts"] == ["a red circle", "a blue square moving up slowly"] and suite["num_prompts"] == 2
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["run", "dmo"], "nearest: 'demo'"),
        (["run", "demo", "--models", "cogvideo-dem"], "nearest: 'cogvideo-demo'"),
        (["run", "demo", "--models", "cogvideox:/no/such/folder"], "there is no folder"),
        (["run", "demo", "--num_prompts", "0"], "at least 1, got 0"),
        (["run", "demo", "--prompts", "test"], "invalid choice"),
        (["run", "demo", "--num_promts", "3"], "nearest: '--num_prompts'"),
        (["report", "/no/such/run"], "is not a run"),
        (["peer"], "invalid choice: 'peer'"),
    ],
)
def test_mistakes_end_with_2_and_one_line(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and reason in error and error.count("\n") == 1


def test_list_and_dry_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["models"].keys() >= set(registry.PRESETS) and "prompt_accuracy" in listed["metrics"]
    assert main(["run", "demo", "--dry-run", "--output_path", str(tmp_path / "no")]) == 0
    assert "seed 3:" in capsys.readouterr().out and not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", suite_names())
def test_suites_of_the_package_are_legal(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name and suite.description
    for model in suite.models:
        assert registry.resolve(model).source == "demo"


@pytest.mark.parametrize("on", [False, True])
def test_the_command_of_a_suite_makes_it_again(on: bool) -> None:
    suite = replace(
        load_suite("full"),
        models=("demo", "my videos"),
        num_prompts=3,
        warm_up=on,
        interleave=on,
        feature_files=("i3d=a file.pt",),
        window=Window.parse("1,8,64,64"),
    )
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    program, verb, *words = shlex.split(suite.command)
    assert (program, verb) == ("cogvideo-bench", "run")
    assert requested_suite(parser.parse_args(words)) == suite


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(
        '{"name": "mine", "models": ["cogvideo-demo"], "prompts": ["a red circle"], "num_prompts": 1}'
    )
    assert load_suite(str(path)) == Suite(
        name="mine", models=("cogvideo-demo",), prompts=("a red circle",), num_prompts=1
    )
    path.write_text('{"name": "mine", "models": ["x"], "promts": 3}')
    with pytest.raises(SettingError, match="nearest: 'prompts'"):
        load_suite(str(path))
