"""The verb `doctor` of CogVideo on whole, damaged and foreign files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cogvideo_ar.__main__ import main
from cogvideo_ar.parts import DEMO


def said(path: Path, capsys: pytest.CaptureFixture[str], code: int) -> dict:
    assert main(["doctor", str(path), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_good_damaged_and_foreign(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]):
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    assert said(model, capsys, 0)["verdict"] == "good"
    shutil.copy(model / "vqvae.safetensors", model / "keyframes.safetensors")
    assert "do not fit" in said(model, capsys, 3)["findings"][0]["reason"]
    (model / "keyframes.safetensors").write_bytes(b"\0" * 64)
    assert "truncated" in said(model, capsys, 3)["findings"][0]["reason"]
    assert said(root / "cogvideox_diff" / "demo", capsys, 3)["next"].startswith("cogvideox doctor")
