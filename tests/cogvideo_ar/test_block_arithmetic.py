"""The example that measures one block runs, and counts what it says it counts."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo_ar.config import PRESETS

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "block_arithmetic.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


@pytest.mark.parametrize("stage", ["keyframes", "interpolation"])
@torch.inference_mode()
def test_costs(example: dict[str, Any], stage: str) -> None:
    config = getattr(PRESETS["cogvideo-demo"](), stage)
    layout = example["LAYOUTS"][stage](config, 7)
    bench = example["Bench"](config, layout, 2, torch.float32)
    hidden = config.hidden_size
    biases_and_norms = 3 * hidden * 2 + hidden * 2 + 5 * hidden + 8 * hidden + hidden  # and the mix
    assert bench.weights == 16 * hidden**2 + biases_and_norms
    keys = 7 + 64 + 7 + (5 * 64 if stage == "keyframes" else 5 * 16)  # text | frame, text | frames or windows
    step = bench.step_cost()
    assert step.num_bytes == 4 * (bench.weights + 2 * 2 * keys * hidden)
    assert step.flops == 2 * 2 * bench.weights + 2 * 4 * keys * hidden
    assert bench.prefill_cost().flops > step.flops and step.time.clock > 0


def test_it_prints_both_stages(
    example: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["block_arithmetic.py", "--preset", "cogvideo-demo", "--threads", "1"])
    example["main"].__globals__["bandwidth"] = lambda: 1e9
    example["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "float32,",
        *("keyframes:", "prefill", "step", "6"),
        *("interpolation:", "prefill", "step", "6"),
    ]
