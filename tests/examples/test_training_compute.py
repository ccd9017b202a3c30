"""The example that counts what training cost."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope="module")
def example(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "training_compute", root / "examples" / "training_compute.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_compute"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_attention_and_its_gradient_are_counted(example: ModuleType) -> None:
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    forward = 2 * 2 * 2 * 8 * 8 * 4  # two products, two heads
    assert example.counted(lambda: F.scaled_dot_product_attention(q, q, q)) == forward
    assert example.counted(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == 3 * forward


def test_totals_match_after_the_steps_that_are_said(example: ModuleType) -> None:
    def stage(name: str, steps: int, each: float) -> object:
        return example.Stage(family="x", name=name, steps=steps, each=each)

    ours = [stage("vae", 10, 5.0), stage("transformer, stills", 20, 2.0), stage("both", 1000, 3.0)]
    steps = example.matching_steps(ours, [stage("all", 1, 390.0)])
    assert steps == 120 and sum(s.total for s in ours[:2]) + (steps - 20) * 3.0 == 390.0


def test_minutes_add_up_over_the_processes_of_a_run(example: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"step": step, "elapsed": elapsed, "seconds_per_step": 1.0 + step % 2}
        for step, elapsed in ((10, 60.0), (20, 120.0), (30, 30.0), (40, 90.0), (50, 120.0))
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    clock, quiet = example.minutes(log, 50)
    assert clock == pytest.approx((120 + 120) / 60) and quiet == pytest.approx(50 / 60)
    assert example.minutes(log, 40)[0] == pytest.approx((120 + 90) / 60)
