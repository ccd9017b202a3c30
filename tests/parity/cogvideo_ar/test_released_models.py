"""The table of CogVideo's released parts: all five, with the recorded numbers of parameters."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.parity.recorded import case_folder, read_json

pytestmark = pytest.mark.parity


def test_counts_and_differences(root: Path):
    cases = case_folder("cogvideo_ar").parent
    lines = runpy.run_path(str(root / "examples" / "released_models.py"))["cogvideo_table"](cases)
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]
    }
    counts = read_json(cases / "cogvideo_ar" / "full_size_manifest.json")["counts"]
    fine = read_json(cases / "cogview2_sr" / "full_manifest.json")
    codec = read_json(cases / "icetk" / "vqvae_full_manifest.json")["total_parameters"]
    for name in ("stage 1", "stage 2"):
        base, own = (int(cell.replace(" ", "")) for cell in rows[name][:2])
        assert (base, own) == (counts["base_transformer"], counts["trainable_mixins"])
    wholes = {"DSR": fine["cogview2-dsr"]["total_parameters"],
              "IterSR": fine["cogview2-itersr"]["total_parameters"], "VQVAE": codec}  # fmt: skip
    assert {name: int(rows[name][2].replace(" ", "")) for name in wholes} == wholes
    assert {cells[3] for name, cells in rows.items() if name[:6] != "stored"} == {"0, 0"} and len(rows) == 6
