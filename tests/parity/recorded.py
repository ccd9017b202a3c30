"""Where the recorded cases are, and how they are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

CASES = Path(os.environ.get("PARITY_CASES") or Path(__file__).parent / "cases")


def case_folder(name: str) -> Path:
    """The folder of a component: icetk, cogview2_sr, cogvideo_ar or cogvideox. Missing is a failure."""
    folder = CASES / name
    assert folder.is_dir(), f"recorded cases are missing: {folder}"
    return folder


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)
