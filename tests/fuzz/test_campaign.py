"""examples/fuzz_campaign.py: it adds up what its parts found, and counts one that died."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.fuzz.harness import Tally


@pytest.fixture
def campaign(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_campaign", root / "examples" / "fuzz_campaign.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def died(words: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
    """As pytest does it: figures for the readers, none for the rest."""
    assert Path(how["cwd"], words[-1]).is_file() and how["env"]["HYPOTHESIS_PROFILE"] == "campaign"
    if "readers" in words[-1]:
        tally = Tally()
        for code in ("accepted", "refused 2", "refused 3"):
            tally.end("bytes", code, "")
        tally.write(Path(how["env"]["FUZZ_FIGURES"]))
    return subprocess.CompletedProcess(words, -11, stdout="no more")


def test_a_campaign(
    campaign: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", died)
    path = tmp_path / "out" / "fuzz.json"
    words = ["fuzz_campaign", "--only", "readers", "cli", "--factor", "9", "--output_path", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    assert campaign.main() == 1
    made = json.loads(path.read_text(encoding="utf-8"))
    assert {name: made[name] for name in campaign.SUMS} == {
        "tried": 3, "refused": 2, "accepted": 1, "too_long": 0, "faults": 1,
    }  # fmt: skip
    assert made["parts"]["readers"]["targets"]["bytes"]["refused 3"] == 1
    assert "cli: 1 x the process ended with -11" in capsys.readouterr().out
