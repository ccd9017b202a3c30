"""The table of the released models: all that is in the manifests, and nothing else."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.parity.recorded import case_folder


@pytest.mark.parity
def test_counts_and_differences(root: Path) -> None:
    manifests = case_folder("cogvideox") / "manifests"
    lines = runpy.run_path(str(root / "examples" / "released_models.py"))["table"](manifests)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    recorded = {file.name.split(".transformer")[0]: file for file in manifests.glob("*.transformer.json")}
    assert {row[0] for row in rows} == recorded.keys()
    for name, transformer, _, _, _, wrong in rows:
        elements = json.loads(recorded[name].read_text(encoding="utf-8"))["elements_in_checkpoint"]
        assert int(transformer.replace(" ", "")) == elements
        assert wrong == "0, 0"
