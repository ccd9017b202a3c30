"""A small suite, two generators that answer to its names, and a run of it that is made once and copied."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.report import write_reports
from benchmarks.runner import run_suite
from benchmarks.storage import RunFolder
from benchmarks.suites import Suite
from tests.benchmarks.fakes import FakeGenerator

Models = dict[str, FakeGenerator]
SUITE = Suite(name="demo", models=("good", "poor"), num_prompts=3, num_clips=2)


def make_models() -> Models:
    return {
        "good": FakeGenerator("good", kernel=1),
        "poor": FakeGenerator("poor", kernel=5, wrong_from=1),
    }


@pytest.fixture
def suite() -> Suite:
    return SUITE


@pytest.fixture
def models() -> Models:
    """Generators that have made nothing yet."""
    return make_models()


@pytest.fixture
def build(models: Models) -> Callable[[str], FakeGenerator]:
    return models.__getitem__


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that is not there yet."""
    return RunFolder(path=tmp_path / "run")


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with its reports; for reading only."""
    folder = RunFolder(path=tmp_path_factory.mktemp("benchmarks") / "run")
    run_suite(SUITE, folder, build=make_models().__getitem__, quiet=True)
    write_reports(folder, {"good": "draws what is asked"})
    return folder


@pytest.fixture
def finished_run(reported: RunFolder, folder: RunFolder) -> RunFolder:
    """A copy of the finished run, for tests that change it."""
    shutil.copytree(reported.path, folder.path)
    return folder
